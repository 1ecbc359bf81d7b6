"""One clip on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from tests.test_report import refuse, refused
from tests.toy import toy_dataset, toy_values


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    dataset = toy_dataset(tmp_path_factory.mktemp("inspect") / "ds", [[25, 30], [40]], fields=("wav", "pitch", "sync"))
    trace = 'Traceback (most recent call last):\n  File "x.py"\nValueError: \x1b[31mred'
    refuse(dataset, [refused("bad/clip", "fault", "ValueError: red", traceback=trace, retriable=True)], pending=1)
    return dataset.uri


def shown(uri: str, key: str, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    capsys.readouterr()
    assert main(["inspect", uri, key]) == status
    return capsys.readouterr().out


def test_json_has_the_fields_as_numpy_sees_them(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", uri, "s0c1", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    values = toy_values("s0c1", 30)
    assert found["clip"]["state"] == "packed"
    assert set(found["fields"]) == {"meta", "wav", "sync", "pitch", "energy"}
    for name in ("wav", "pitch", "energy"):
        one, value = found["fields"][name], values[name].astype(np.float64)
        assert (one["dtype"], one["shape"]) == (str(values[name].dtype), list(value.shape))
        assert [one[key] for key in ("low", "mean", "high")] == pytest.approx(
            [np.nanmin(value), np.nanmean(value), np.nanmax(value)]
        )
        assert one["missing"] == np.isnan(value).sum()
        assert one["tar"].startswith("columns/energy/" if name == "energy" else "train/train-000000-")
    assert found["figures"]["voiced"] == pytest.approx(100 * (values["pitch"] > 0).mean())


def test_text_has_curves(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(uri, "s0c0", capsys)
    energy = next(line for line in text.splitlines()[::-1] if line.startswith("  energy  "))
    # The toy's energy rises by one a frame: 50 frames, 50 characters, from the lowest block to the highest.
    blocks = energy.removeprefix("  energy  ").split("  ")[0]
    assert len(blocks) == 50
    assert list(blocks) == sorted(blocks)
    assert set(blocks) == set("▁▂▃▄▅▆▇█")
    pitch = next(line for line in text.splitlines()[::-1] if line.startswith("  pitch   "))
    assert pitch.removeprefix("  pitch   ")[:50:3] == " " * 17  # every third frame is unvoiced
    assert "packed, train/train-000000-" in text


def test_why_it_was_refused(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(uri, "bad/clip", capsys)
    assert "refused  by faces: fault, retriable: ValueError: red" in text
    assert 'File "x.py"' in text
    assert "\x1b" not in text
    page = tmp_path / "clip.html"
    assert main(["inspect", uri, "bad/clip", "-o", str(page)]) == 0
    assert "<summary>Traceback</summary>" in page.read_text()
    assert "not built yet" in shown(uri, "p0", capsys)


def test_a_key_that_is_not_there(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for word, near in (("s0c9", "s0c1"), ("clip", "bad/clip")):
        assert main(["inspect", uri, word]) == 2
        error = capsys.readouterr().err
        assert f"no clip '{word}'" in error
        assert near in error
        assert error.count("\n") == 1
    assert main(["inspect", uri, "s0c0", "-o", "none.pdf"]) == 2


def test_damage_is_said_beside_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[25]], fields=("pitch", "mel"))
    (shard,) = dataset.index().shards
    path = tmp_path / "ds" / shard.name
    offset, size = shard.clips[0].members["mel"]
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = bytes(size)
    path.write_bytes(data)
    text = shown(dataset.uri, "s0c0", capsys, status=1)
    assert "note     " in text
    assert "mel: damaged npy" in text
    assert "\n  pitch      float32" in text
    path.unlink()
    text = shown(dataset.uri, "s0c0", capsys, status=1)
    assert f"note     {path}: missing" in text
    assert main(["inspect", dataset.uri, "s0c0", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["notes"]
