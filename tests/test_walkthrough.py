"""The walk-through's commands, settings and figures are those of the code."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.cost import gpu_stages, measured_table, recorded_share
from benchmarks.cost_inputs import Job, Prices
from cli.main import COMMANDS, EVALUATIONS
from model.train_config import TrainConfig
from model.vocoder.train_config import VocoderConfig
from pipeline.config import BuildConfig
from shards.config import Config, load_config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import MANIFEST, ColumnRef, Manifest, ObjectRef, PackRef
from shards.schema import SCHEMA_VERSION

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
LINES = [
    line.removeprefix("$ ").partition("f2v ")[2]
    for _, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(\$ )?(torchrun .* )?f2v ", line)
]

CONFIGS: dict[str, type[Config]] = {
    "build": BuildConfig,
    "plan": BuildConfig,
    "units": BuildConfig,
    "train": TrainConfig,
    "vocoder": VocoderConfig,
}
"""What the `--set` of a command goes into."""


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
    overrides = getattr(given, "set", None)
    if overrides:
        load_config(CONFIGS[name], None, overrides)
        section = overrides[0].partition("=")[0]
        with pytest.raises(UserError, match=re.escape(f"{section}x")):
            load_config(CONFIGS[name], None, [overrides[0].replace("=", "x=", 1)])


def test_files_are_there_before_they_are_used() -> None:
    """Of the names that the page gives to files: the settings travel with the weights, by `ray up`."""
    for made, used in [
        ("f2v units fit", "centroids: /home/ray/lrs3/units.npy"),
        ("`~/lrs3/lrs3.yaml`, beside the weights", "\nray up ray_cluster.yaml\n"),
        ("/home/ray/lrs3: ~/lrs3", "\nray up ray_cluster.yaml\n"),
        ("\nray up ray_cluster.yaml\n", "\nray attach ray_cluster.yaml\n"),
        ("\nray attach ray_cluster.yaml\n", "--config /home/ray/lrs3/lrs3.yaml"),
        ("-o report.html", "ray rsync-down ray_cluster.yaml /home/ray/report.html"),
        ("ray rsync-down", "\nray down ray_cluster.yaml\n"),
        ("f2v weights convert large_vox_iter5.pt lips.safetensors", "lip_weights=lips.safetensors"),
        ("s3://BUCKET/runs/one \\", "--checkpoint s3://BUCKET/runs/one"),
        ("s3://BUCKET/runs/vocoder\n", "--vocoder s3://BUCKET/runs/vocoder"),
    ]:
        assert made in PAGE, made
        assert PAGE.index(made) < PAGE.index(used), used


def test_nodes_find_what_the_settings_name_where_it_is_put() -> None:
    [block] = [text for kind, text in BLOCKS if kind == "yaml"]
    [(there, here)] = re.findall(r"^  (/home/ray/lrs3): (~/\S+)$", PAGE, re.M)
    named = re.findall(r"(/home/ray/[\w./-]+)", block + "\n".join(re.findall(r"--config \S+", PAGE)))
    assert {f"{there}/lrs3.yaml", f"{there}/units.npy", f"{there}/lrs3-valid.id", there} == set(named)
    for name in ("units.npy", "lrs3.yaml"):
        assert f"{here}/{name}" in PAGE


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
    # Machines are paid for while they are there, whatever they do.
    [(hours, price)] = re.findall(r"^4 L4 \(est\.\) +([\d.]+) +([\d.]+)$", PAGE.partition("training,")[0], re.M)
    assert float(price) == pytest.approx(float(hours) * 4 * 0.40, rel=0.01)
    run = yaml.safe_load(next(text for kind, text in BLOCKS if kind == "yaml"))["run"]
    assert run["prices"]["gpu"] == 0.40
    assert run["prices"]["cpu"] == pytest.approx(16 * 0.015)
    total = float(price) + float(hours) * run["prices"]["head"]
    assert f"{hours} hours of them and of the head are 37 × $0.40 + {hours} × $0.20, about ${total:.0f}" in PAGE
    [(rate, size)] = re.findall(r"^packed, what training reads +([\d.]+) +(\d+)", PAGE, re.M)
    # JPEG lips, float16 [F, 512] and [F, 768], float32 [2F, 80], pitch and energy float32, units int16; timbre and tar
    payload = 51_439 + 25 * 2 * (512 + 768) + 50 * (80 * 4 + 4 + 4 + 2)
    assert float(rate) * 1000 == pytest.approx(payload, rel=0.02)
    assert float(size) == pytest.approx(float(rate) * 440 * 3600 / 1e6, abs=1)


def write_manifest(dataset: Dataset, frames: int) -> None:
    """Of a dataset of the paper profile: a packed shard, and one that is not packed yet."""
    shared: dict[str, Any] = {"recipe": "", "reads": {}, "media": "", "attempt": 1, "record": "", "sha256": ""}
    columns = {
        stage: {
            shard: ColumnRef(fingerprint="", bytes=1000, clips=2, refused=0, seconds=seconds, **shared)
            for shard in ("train-000000", "train-000001")
        }
        for stage, seconds in (("landmarks", 120.0), ("audio", 6.0))
    }
    made: dict[str, Any] = {"inputs": "", "record": "", "name": None, "behind": [], "sha256": "", "refused": {}}
    pack = PackRef(bytes=2000, clips=2, frames=frames, seconds=0.0, **made)
    nothing = ObjectRef(name="x", sha256="", bytes=0)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        profile="paper",
        source="",
        config=load_config(BuildConfig, None, ["profile=paper"]).model_dump(mode="json", exclude={"run"}),
        codebook=None,
        recipes={},
        columns=columns,
        shards={"train-000000": 2, "train-000001": 2},
        packs={"train-000000": pack},
        clips=nothing,
        quarantine=nothing,
        index=nothing,
    )
    dataset.store.write(MANIFEST, manifest.model_dump_json().encode())


def test_a_share_of_a_gpu_costs_that_share(tmp_path: Path) -> None:
    """Worker seconds of stages with a GPU at the GPU's price by share, others at a processor's."""
    dataset = Dataset(str(tmp_path))
    write_manifest(dataset, frames=0)
    with pytest.raises(UserError, match="no clip is packed"):
        measured_table(dataset, Job())
    write_manifest(dataset, frames=25 * 60)  # a minute, on which landmarks took 120 worker seconds and audio 6
    with pytest.raises(UserError, match="say it with --share"):
        recorded_share(dataset, gpu_stages(dataset.manifest()))

    def dollars(share: float) -> dict[str, float]:
        lines = measured_table(dataset, Job(hours=100, share=share, prices=Prices(cpu=0.02, gpu=0.60)))
        return {line.split()[0]: float(line.split()[-1]) for line in lines if line.startswith(("land", "aud", "all"))}

    assert dollars(0.25) == pytest.approx({"landmarks": 200 * 0.25 * 0.60, "audio": 10 * 0.02, "all": 30.2}, abs=0.01)
    assert dollars(0.0) == pytest.approx({"landmarks": 200 * 0.02, "audio": 10 * 0.02, "all": 4.2}, abs=0.01)
