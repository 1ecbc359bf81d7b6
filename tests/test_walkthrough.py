"""The walk-through's commands, settings and figures are those of the code."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cli.main import COMMANDS, EVALUATIONS
from pipeline.config import BuildConfig
from shards.config import Config, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
LINES = [
    line.removeprefix("$ ").partition("f2v ")[2]
    for _, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(\$ )?(torchrun .* )?f2v ", line)
]


@pytest.mark.parametrize("line", LINES)
def test_commands_are_taken(line: str) -> None:
    name, *rest = shlex.split(line, comments=True)
    assert name in COMMANDS
    if name == "evaluate" and rest[0] in EVALUATIONS:
        name = f"{name}_{rest.pop(0)}"
    command = argparse.ArgumentParser(exit_on_error=False)
    module = importlib.import_module(f"cli.{name}")
    module.configure(command)
    parse = command.parse_args if name in ("units", "vocoder", "weights") else command.parse_intermixed_args
    given = parse(rest)
    overrides = list(getattr(given, "set", None) or [])
    kinds = {"build": BuildConfig, "plan": BuildConfig}
    if overrides and name in kinds:
        checked: Config = load_config(kinds[name], None, overrides)
        assert checked


def test_settings_are_valid_and_for_a_cluster(tmp_path: Path) -> None:
    [block] = [text for kind, text in BLOCKS if kind == "yaml"]
    assert yaml.safe_load(block)["profile"] == "paper"
    (tmp_path / "lrs3.yaml").write_text(block)
    run = load_config(BuildConfig, tmp_path / "lrs3.yaml", []).run
    assert run.ray_address
    assert run.gpus < 1


def test_figures_are_those_that_the_command_prints() -> None:
    command = [sys.executable, "-m", "benchmarks.cost"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"```\n$ python -m benchmarks.cost\n{said}```" in PAGE


def test_figures_follow_from_the_stated_arithmetic() -> None:
    """A row, a sum, a price and a size, from the page's own formulas and published shapes."""
    [faces] = re.findall(r"^landmarks +([\d,.]+) +([\d,.]+) +([\d.]+) +([\d.]+) +([\d,.]+) +([\d,.]+)(.*)$", PAGE, re.M)
    ms32, ms16, gpu, beside, hours32, hours16 = (float(number.replace(",", "")) for number in faces[:6])
    assert hours32 == pytest.approx(440 * ms32 / 1000, abs=0.06)
    assert hours16 == pytest.approx(440 * ms16 / 1000, abs=0.06)
    large, small = map(float, faces[6].split())
    assert large == pytest.approx(0.44 * max(gpu, beside * 0.25), abs=0.06)
    assert small == pytest.approx(0.44 * max(gpu / 0.12, beside * 0.25), abs=0.06)
    [(hours, price)] = re.findall(r"^256 cores, bfloat16 +([\d.]+) +([\d.]+)$", PAGE, re.M)
    assert float(price) == pytest.approx(float(hours) * 256 * 0.015, rel=0.005)
    [(rate, size)] = re.findall(r"^packed, what training reads +([\d.]+) +(\d+)", PAGE, re.M)
    # JPEG lips, float16 [F, 512] and [F, 768], float32 [2F, 80], pitch and energy float32, units int16; timbre and tar
    payload = 51_439 + 25 * 2 * (512 + 768) + 50 * (80 * 4 + 4 + 4 + 2)
    assert float(rate) * 1000 == pytest.approx(payload, rel=0.02)
    assert float(size) == pytest.approx(float(rate) * 440 * 3600 / 1e6, abs=1)
