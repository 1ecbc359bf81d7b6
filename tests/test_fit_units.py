"""`f2v units`: centroids from folders of audio and from joblib files, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import av
import joblib
import numpy as np
import pytest
import soundfile
from sklearn.cluster import MiniBatchKMeans

from cli.main import main
from pipeline.audio_files import draw, list_audio, read_audio
from pipeline.units import load_codebook
from shards.errors import UserError


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sentences in LJ Speech's layout at 22.05 kHz, a file that is no audio, and one outside `wavs`."""
    folder = tmp_path_factory.mktemp("lj")
    (folder / "wavs").mkdir()
    (folder / "metadata.csv").write_text("LJ001-0001|a|a\n")
    random = np.random.default_rng(0)
    for number in range(4):
        seconds = np.arange(22050 * 3) / 22050
        tone = 0.2 * np.sin(2 * np.pi * (100 + 80 * number) * seconds * (1 + 0.1 * np.sin(3 * seconds)))
        soundfile.write(folder / "wavs" / f"LJ001-000{number}.wav", tone + 0.01 * random.normal(size=len(tone)), 22050)
    (folder / "wavs" / "broken.wav").write_bytes(b"RIFF nothing")
    soundfile.write(folder / "wavs" / "still.wav", np.zeros(22050), 22050)
    soundfile.write(folder / "other.wav", np.zeros(16000), 16000)
    return folder


def test_the_layout_of_lj_speech_and_any_folder(speech: Path) -> None:
    assert [path.name for path in list_audio(speech)] == [
        *(f"LJ001-000{n}.wav" for n in range(4)),
        "broken.wav",
        "still.wav",
    ]
    assert len(list_audio(speech / "wavs")) == 6
    with pytest.raises(UserError, match="no audio file"):
        list_audio(Path(__file__).parent)
    with pytest.raises(UserError, match="no such folder"):
        list_audio(speech / "absent")


def test_a_draw_depends_on_seed_and_paths_below_the_folder_alone() -> None:
    names = [f"{speaker}/{number}.wav" for speaker in range(10) for number in range(10)]

    def drawn(root: str, seed: int, order: int = 1) -> list[str]:
        paths = [Path(root, name) for name in names[::order]]
        return [path.relative_to(root).as_posix() for path in draw(paths, 0.2, seed, Path(root))]

    here = drawn("a", 1)
    assert len(here) == 20
    assert here == drawn("b/c", 1, -1)
    assert set(here) != set(drawn("a", 2))
    # Files of one name in several folders are drawn on their own.
    assert len({Path(name).name for name in here}) > 2
    assert {name for name in names if Path(name).name in {Path(one).name for one in here}} != set(here)
    assert len(draw([Path("x.wav")], 0.01, 1, Path())) == 1


def test_opposed_channels_do_not_cancel_and_containers_are_read(tmp_path: Path) -> None:
    seconds = np.arange(48_000 * 2) / 48_000
    tone = (0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    soundfile.write(tmp_path / "turned.wav", np.stack([tone, -tone], axis=1), 48_000)
    with av.open(str(tmp_path / "t.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([tone, -tone]), format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    (tmp_path / "broken.m4a").write_bytes(b"nothing")
    assert len(list_audio(tmp_path)) == 3
    for name in ("turned.wav", "t.m4a"):
        (piece,) = read_audio(tmp_path / name)
        assert len(piece) == pytest.approx(32_000, abs=640)
        assert np.sqrt((piece[2000:-2000] ** 2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)
    with pytest.raises(OSError, match=r"broken\.m4a"):
        list(read_audio(tmp_path / "broken.m4a"))


def test_sound_comes_in_whole_frames_at_16_khz(tmp_path: Path) -> None:
    seconds = np.arange(44100 * 70) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 1000 * seconds)
    soundfile.write(tmp_path / "t.flac", np.stack([tone, tone], axis=1), 44100)
    pieces = list(read_audio(tmp_path / "t.flac"))
    assert [len(piece) for piece in pieces] == [480_000, 480_000, 160_000]
    middle = pieces[0][1000:-1000]
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(1000, 479_000) / 16000)
    assert np.abs(middle - wanted).max() < 0.01


def test_fit_writes_centroids_that_a_build_takes(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "units.npy"
    command = ["units", "fit", str(speech), "-o", str(target), "--fraction", "1", "--set", "speech.clusters=12"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert load_codebook(target).shape == (12, 384)
    assert report["clusters"] == 12
    assert report["frames"] == 4 * 150
    assert 0 < report["inertia"] < report["variance"]
    assert (report["found"], report["taken"], report["seconds"]) == (6, 4, 12.0)
    assert list(report["skipped"]) == ["wavs/broken.wav", "wavs/still.wav"]
    first = target.read_bytes()
    target.write_bytes(b"dear")
    assert main(command) == 2
    assert f"{target}: is there already" in capsys.readouterr().err
    assert target.read_bytes() == b"dear"
    assert main([*command, "--force"]) == 0
    assert target.read_bytes() == first
    out = capsys.readouterr().out
    assert "12 clusters on 600 frames" in out
    assert "6 files of 6 drawn: 4 taken (12.0 s of sound), 2 skipped" in out
    assert "wavs/broken.wav: unreadable (" in out
    assert "wavs/still.wav: silent" in out
    assert f"--set speech.centroids={target} --set speech.clusters=12" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fraction", "0"], "--fraction"),
        (["--frames", "0"], "--frames"),
        (["--set", "speech.clusters=5000", "--fraction", "1"], "5000 clusters"),
        (["--set", "speech.layer=9"], "speech.layer 9"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["units", "fit", str(speech), "-o", str(tmp_path / "u.npy"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "u.npy").exists()


def test_a_folder_without_speech_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "still.wav", np.zeros(16000), 16000)
    assert main(["units", "fit", str(tmp_path), "-o", str(tmp_path / "u.npy")]) == 2
    assert "no usable sound in 1 file, e.g. still.wav: silent" in capsys.readouterr().err


def test_import_says_that_it_unpickles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    kmeans = MiniBatchKMeans(6, n_init=1, random_state=0).fit(features)
    joblib.dump(kmeans, tmp_path / "km.bin")
    assert main(["units", "import", str(tmp_path / "km.bin"), "-o", str(tmp_path / "u.npy")]) == 0
    out = capsys.readouterr().out
    assert "unpickled" in out
    assert "--set speech.clusters=6" in out
    np.testing.assert_array_equal(load_codebook(tmp_path / "u.npy"), kmeans.cluster_centers_)
    assert main(["units", "import", str(tmp_path / "absent"), "-o", str(tmp_path / "u.npy")]) == 2
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "notes.txt").write_text("units: 100\n")
    for name, words in (("u.npy", "needs no import"), ("notes.txt", "is a text file"), ("km.bin", "--force")):
        capsys.readouterr()
        output = "u.npy" if name == "km.bin" else "v.npy"
        assert main(["units", "import", str(tmp_path / name), "-o", str(tmp_path / output)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
    for output in ("u.bin", "folder.npy"):
        capsys.readouterr()
        assert main(["units", "import", str(tmp_path / "km.bin"), "-o", str(tmp_path / output)]) == 2
        assert "ends in .npy" in capsys.readouterr().err
