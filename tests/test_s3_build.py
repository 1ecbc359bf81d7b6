"""Source and dataset in a bucket: the same bytes as on disk, training from it, and builds that run out of rights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import webdataset as wds

from cli.main import main
from pipeline.build import build
from pipeline.selection import Selection
from shards.dataset import Dataset
from shards.errors import UserError
from shards.export import export
from shards.storage import TEMPORARY, open_store
from shards.verify import verify
from tests.buckets import patience
from tests.conftest import small_build
from tests.seaweed import S3Server, aws_environment
from tests.toy import digests

# A Ray of its own, whose workers have this test's credentials.
CONFIG = {"pack": {"shard_clips": 2}, "speech": {"clusters": 20}, "run": {"cpus": 2}}


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, one that is silent, and one that is no media."""
    folder = tmp_path_factory.mktemp("source")
    clips = [*sorted((corpus / "train").rglob("*.mp4"))[:2], *(corpus / "test").rglob("*.mp4")]
    for path in clips:
        for file in (path, path.with_suffix(".txt")):
            target = folder / file.relative_to(corpus)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    # Dots would split a key for WebDataset; spaces and accents must come back.
    odd = next((folder / "test").rglob("*.mp4"))
    odd.rename(odd.with_name("odd name.v2 ü.mp4"))
    shutil.copy(corpus / "faulty" / "silent.mp4", folder / "silent.mp4")
    (folder / "train" / "broken é.mp4").write_bytes(b"no media")
    return folder


@pytest.fixture(scope="module")
def on_disk(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    dataset = Dataset(str(tmp_path_factory.mktemp("disk") / "ds"))
    build(str(source), dataset.uri, small_build(pack=CONFIG["pack"], speech=CONFIG["speech"]))
    return dataset


def upload(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_a_bucket_gives_the_same_shards_as_a_disk(
    source: Path, on_disk: Dataset, s3_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(source, f"{s3_uri}/videos")
    dataset = Dataset(f"{s3_uri}/ds")
    summary = build(f"{s3_uri}/videos", dataset.uri, small_build(**CONFIG))
    assert digests(dataset) == digests(on_disk)
    assert verify(dataset.uri).problems == []
    keys = {row.key for row in dataset.clips() if row.split == "test"}
    assert {unquote(key).rpartition("/")[2] for key in keys} == {"odd name.v2 ü"}
    urls = [f"{on_disk.uri}/{shard.name}" for shard in dataset.index().shards if shard.split == "test"]
    assert {sample["__key__"] for sample in wds.WebDataset(urls, shardshuffle=False)} == keys
    reasons = {row.key: row.reason for row in dataset.quarantine()}
    assert reasons == {row.key: row.reason for row in on_disk.quarantine()}
    assert summary.quarantined == {"silent": 1, "unreadable": 1}
    assert all(row.uri.startswith(f"{s3_uri}/videos/") for row in dataset.clips())
    # Credentials are nowhere in the dataset.
    for found in dataset.store.list():
        if found.name.endswith(".json"):
            data = dataset.store.read(found.name)
            assert b"SECRET" not in data.upper()
            assert b"ACCESS_KEY" not in data.upper()
    # Nothing to do, by the command line, from the dataset's own source; media are not read again.
    assert main(["build", dataset.uri]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["plan", dataset.uri, "--set", "energy.kind=norm"]) == 0
    assert "kind log_norm -> norm" in capsys.readouterr().out
    assert build(None, dataset.uri, small_build(**CONFIG, energy={"kind": "norm"}), Selection(only=("energy",))).tasks
    assert main(["verify", dataset.uri]) == 0
    assert main(["gc", dataset.uri, "--grace", "0s", "--delete"]) == 0
    assert main(["verify", dataset.uri, "--quick"]) == 0
    # Trainers and exports read from the bucket, with and without worker processes.
    for workers in (0, 1):
        run = str(tmp_path / f"run{workers}")
        small = ("size=tiny", "steps=1", "data.batch=2", f"data.workers={workers}", "threads=1")
        options = [part for override in small for part in ("--set", override)]
        assert main(["train", dataset.uri, run, *options]) == 0
    exported = export(dataset.uri, f"{s3_uri}/export", ["wav", "mel"], ["train"])
    assert [shard.name for shard in exported.shards] == [
        f"{shard.shard}.tar" for shard in dataset.index().shards if shard.split == "train"
    ]


def test_a_bucket_that_turns_read_only_in_the_middle(
    source: Path,
    on_disk: Dataset,
    s3_uri: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = Dataset(f"{s3_uri}/ds")
    build(str(source), dataset.uri, small_build(**CONFIG), Selection(only=("faces",)))
    before = {found.name: found.stamp for found in dataset.store.list()}
    with monkeypatch.context() as denied:
        aws_environment(denied, s3_server.read_only_env, tmp_path)
        patience(denied)  # forgets the clients of the other key
        assert main(["build", dataset.uri]) == 2
        error = capsys.readouterr().err
        assert "access denied" in error.splitlines()[-1]
        assert not [word for word in s3_server.read_only_env.values() if word in error and "http" not in word]
    patience(monkeypatch)
    assert {found.name: found.stamp for found in Dataset(dataset.uri).store.list()} == before
    build(None, dataset.uri, small_build(**CONFIG))
    assert digests(dataset) == digests(on_disk)


def test_a_missing_bucket_or_an_empty_prefix_is_one_line(s3_uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        build(f"{s3_uri}/nothing", str(tmp_path / "ds"), small_build())
    with pytest.raises(UserError, match="no such bucket"):
        build("s3://no-such-bucket/videos", str(tmp_path / "ds"), small_build())
    assert not (tmp_path / "ds").exists()


def test_a_table_in_a_bucket_names_media_beside_it_and_elsewhere(source: Path, s3_uri: str) -> None:
    from pipeline.sources import SourceConfig, list_clips

    upload(source, f"{s3_uri}/videos")
    one = next((source / "test").rglob("*.mp4"))
    table = f"uri,key\n{one.relative_to(source)},beside\n{one},elsewhere\n{s3_uri}/videos/silent.mp4,whole\n"
    open_store(f"{s3_uri}/videos").write("list.csv", table.encode())
    clips = {clip.key: clip for clip in list_clips(f"{s3_uri}/videos/list.csv", SourceConfig()).clips}
    assert clips["beside"].uri == f"{s3_uri}/videos/{one.relative_to(source)}"
    assert clips["beside"].digest == clips["elsewhere"].digest != clips["whole"].digest


FULL_DISK = """
set -e
mount -t tmpfs -o size=800k tmpfs "$2"
set +e
"$0" -m cli.main build "$1" "$2/ds" --set pack.shard_clips=2 --set speech.clusters=20; echo "first: $?"
ls -A "$2/ds" | grep writing
mount -o remount,size=64m "$2"
"$0" -m cli.main build "$1" "$2/ds" --set pack.shard_clips=2 --set speech.clusters=20; echo "second: $?"
"$0" -m cli.main verify "$2/ds"; echo "verify: $?"
"""


def test_a_full_disk_is_said_and_the_build_goes_on_later(source: Path, tmp_path: Path) -> None:
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip("needs user namespaces to make a small disk (unshare -rm)")
    command = ["unshare", "-rm", "sh", "-c", FULL_DISK, sys.executable, str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert "first: 2\nsource" in done.stdout, done
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert TEMPORARY not in done.stdout
    assert "second: 0" in done.stdout, done
    assert "verify: 0" in done.stdout, done
