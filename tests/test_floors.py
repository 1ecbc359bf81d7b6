"""The house rules: imports go down only, and the training path stays lean."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.registry import STAGES, writers
from pipeline.stage import Stage
from shards.schema import FIELDS

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("shards", "pipeline", "model", "cli")
HEAVY = {"ray", "cv2", "librosa", "transformers", "onnxruntime", "dlib", "av", "sklearn"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    climbing = {file.name: imports(file) & above for file in (ROOT / floor).rglob("*.py") if imports(file) & above}
    assert not climbing


def loaded(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_the_training_path_is_lean() -> None:
    assert not loaded("import model.train, shards.stream, shards.verify") & HEAVY


def test_help_and_planning_import_no_network_library() -> None:
    assert not loaded("import cli.main") & {*HEAVY, "torch", "numpy"}
    assert not loaded("import pipeline.config, pipeline.registry") & {*HEAVY, "torch"}


def test_stages_fit_together_and_fill_the_schema() -> None:
    assert {*writers(STAGES), "meta"} == set(FIELDS)


def test_a_stage_that_reads_what_nobody_wrote_is_refused() -> None:
    class Odd(Stage):  # type: ignore[type-arg]
        name, version, reads, writes = "mel", 1, ("aura",), ("mel",)

    with pytest.raises(ValueError, match="aura"):
        writers([Odd])  # type: ignore[type-abstract]
    with pytest.raises(ValueError, match="both write"):
        writers([*STAGES, STAGES[-1]])
