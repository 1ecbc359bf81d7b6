"""The build: videos in, the same shards every time, and every clip accounted for."""

from __future__ import annotations

import csv
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from cli.main import main
from pipeline.build import Summary, build
from shards.codec import decode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.schema import FIELDS
from shards.verify import verify
from tests.conftest import small_build
from tests.toy import everything, tars

Built = tuple[Dataset, Summary]
REAL = {
    "01_grid_bbaf2n_25fps": "packed",
    "02_grid_brbk7n_23976": "packed",
    "03_grid_lbax4n_portrait_rot_30fps": "packed",
    "08_two_faces_grid_sbia1a_L_swiz3n_R": "several_faces",
    "09_pyfeat_face_noface_hevc_vfr": "face_lost",
    "10_face_scenery_face_two_speakers_cut": "face_lost",
    "11_truncated_no_moov": "unreadable",
    "12_truncated_faststart_60pct": "truncated",
    "13_grid_swiz3n_vfr": "packed",
    "14_pexels_silent_track_23976": "silent",
    "15_grid_lbax4n_audio_late_240ms": "packed",
}
"""What the clips' own notes say must become of them."""


def test_good_clips_are_packed_and_faulty_ones_are_named(built: Built) -> None:
    dataset, summary = built
    assert summary.clips == 12
    reasons = {row.key: (row.stage, row.reason) for row in dataset.quarantine()}
    assert reasons == {
        "faulty/no_audio": ("audio", "no_audio"),
        "faulty/no_face": ("faces", "no_face"),
        "faulty/playlist": ("faces", "unreadable"),
        "faulty/silent": ("audio", "silent"),
        "faulty/too_short": ("faces", "too_short"),
        "faulty/truncated": ("faces", "truncated"),
    }
    assert all(row.message and row.uri in row.message for row in dataset.quarantine())
    assert verify(dataset.uri).problems == []


def test_every_length_hangs_on_the_video(built: Built) -> None:
    for key, values in everything(built[0]).items():
        frames = values["meta"]["frames"]
        lengths = {
            name: len(value) for name, value in values.items() if name not in ("meta", "track", "sync", "timbre")
        }
        assert lengths == {
            **dict.fromkeys(("boxes", "points5", "face", "landmarks", "lips", "identity", "expression"), frames),
            **dict.fromkeys(("mel", "pitch", "energy", "units"), 2 * frames),
            "wav": 640 * frames,
        }, key


def test_features_agree_with_the_sound(built: Built) -> None:
    """Silence at both ends, speech in between: energy, pitch and mouth must say so on one clock."""
    for values in everything(built[0]).values():
        energy, pitch = values["energy"], values["pitch"]
        assert energy[:8].max() < energy[20:-20].max() - 3
        assert np.isnan(pitch[:8]).all()
        assert np.isfinite(pitch).sum() > 20
        # Loudness under the mel's window: 1280 samples about the middle of each frame of 320.
        padded = np.pad(values["wav"].astype(float), 480, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, 1280)[::320]
        loudness = np.sqrt(((frames * np.hanning(1280)) ** 2).mean(axis=1))
        shifts = range(-5, 6)
        scores = [np.corrcoef(np.roll(np.log(loudness + 1), shift), energy)[0, 1] for shift in shifts]
        assert shifts[int(np.argmax(scores))] == 0


def test_plain_webdataset_reads_every_clip(built: Built) -> None:
    dataset, _ = built
    urls = [f"{dataset.uri}/{shard.name}" for shard in dataset.index().shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert {sample["__key__"] for sample in samples} == {row.key for row in dataset.clips() if row.state == "packed"}
    for sample in samples:
        assert sample["mel.npy"].shape == (2 * sample["json"]["frames"], 80)
        assert sample["json"]["text"]


def test_a_second_build_does_nothing_and_touches_nothing(corpus: Path, built: Built) -> None:
    dataset, _ = built
    before = {found.name: found.stamp for found in dataset.store.list()}
    summary = build(str(corpus), dataset.uri, small_build())
    assert (summary.tasks, summary.packed, summary.changed) == (0, 0, False)
    assert {found.name: found.stamp for found in dataset.store.list()} == before


def test_other_folder_other_order_same_bytes(corpus: Path, built: Built, tmp_path: Path) -> None:
    """What a first run left behind is completed by a second one, with one worker instead of two."""
    dataset, _ = built
    other = Dataset(str(tmp_path / "again"))
    build(str(corpus), other.uri, small_build())
    root = tmp_path / "again"
    for name in ("columns/pitch", "packs", "tables", "train"):
        shutil.rmtree(root / name)
    (root / "dataset.json").unlink()
    summary = build(str(corpus), other.uri, small_build(run={"cpus": 1}))
    assert summary.tasks == len(other.manifest().shards)  # pitch alone
    assert tars(other) == tars(dataset)


def test_nothing_usable_is_a_dataset_of_quarantine(corpus: Path, tmp_path: Path) -> None:
    dataset = Dataset(str(tmp_path / "ds"))
    summary = build(str(corpus / "faulty"), dataset.uri, small_build())
    assert summary.clips == 0
    assert sum(summary.quarantined.values()) == 6
    assert len(dataset.quarantine()) == 6
    assert verify(dataset.uri).problems == []
    assert build(None, dataset.uri, small_build()).tasks == 0
    # A good clip that comes later is built as usual.
    source = tmp_path / "source"
    source.mkdir()
    for path in (corpus / "faulty").iterdir():
        shutil.copy(path, source / path.name)
    shutil.copytree(corpus / "test", source / "test")
    shutil.copytree(corpus / "valid", source / "valid")
    assert build(str(source), dataset.uri, small_build()).clips == 2
    assert verify(dataset.uri).problems == []


def test_no_cluster_at_the_address_is_said_soon(corpus: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"no cluster at '127\.0\.0\.1:9'"):
        build(str(corpus), str(tmp_path / "ds"), small_build(run={"ray_address": "127.0.0.1:9"}))
    assert time.monotonic() - begin < 10


def test_lip_frames_can_be_read_alone(built: Built) -> None:
    dataset, _ = built
    shard = dataset.index().shards[0]
    clip = shard.clips[0]
    offset, size = clip.members["lips"]
    data = dataset.store.read(shard.name)[offset : offset + size]
    whole = decode(FIELDS["lips"], data, clip.frames)
    np.testing.assert_array_equal(decode(FIELDS["lips"], data, clip.frames, 10, 30), whole[10:30])


def test_another_profile_or_a_file_is_refused(built: Built, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        build(str(corpus), str(file), small_build())
    copy = Dataset(str(tmp_path / "copy"))
    copy.commit(built[0].manifest().model_copy(update={"profile": "paper"}), None)
    with pytest.raises(UserError, match="profile paper"):
        build(str(corpus), copy.uri, small_build())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex"):
        build(str(corpus), str(tmp_path / "other"), small_build())


def test_too_little_sound_for_the_units_is_one_clear_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"too few for 9999 clusters.*speech\.clusters"):
        build(str(corpus / "test"), str(tmp_path / "ds"), small_build(speech={"clusters": 9999}))


def test_real_clips_end_where_their_notes_say(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ds"
    assert main(["build", str(clips), str(folder), "--profile", "offline"]) == 0
    assert "5 clips" in capsys.readouterr().out
    dataset = Dataset(str(folder))
    ends = {row.key: row.reason for row in dataset.quarantine()}
    ends |= {row.key: row.state for row in dataset.clips() if row.state == "packed"}
    assert ends == REAL
    assert main(["verify", str(folder)]) == 0
    with open(clips / "MANIFEST.csv", newline="", encoding="utf-8") as stream:
        seconds = {row["file"].rsplit(".", 1)[0]: row["seconds"] for row in csv.DictReader(stream)}
    for row in dataset.clips():
        if row.state == "packed":
            assert row.frames == round(25 * float(seconds[row.key])), row.key
