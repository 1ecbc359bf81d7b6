"""The report of a dataset in a bucket: by byte ranges, few of them, and never a whole shard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli.main import main
from shards.storage import open_store
from tests.proxy import FaultProxy
from tests.seaweed import S3Server
from tests.toy import toy_dataset


def test_a_bucket_is_read_in_parts(
    s3_server: S3Server,
    s3_uri: str,
    proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[60] * 6, [75] * 6])
    store = open_store(s3_uri)
    for path in Path(dataset.uri).rglob("*"):
        if path.is_file():
            store.write(path.relative_to(dataset.uri).as_posix(), path.read_bytes())
    packed = sum(shard.bytes for shard in dataset.index().shards)
    proxy.asked.clear()
    assert main(["report", s3_uri, "--json", "--sample", "12", "--clips", "0"]) == 0
    there = capsys.readouterr().out
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for method, asked in proxy.asked if method == "GET" and asked]
    fetched = sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found)
    # All clips were looked at: landmarks, boxes and the features of the sound, but no pictures.
    assert 0 < fetched < 0.1 * packed
    assert main(["report", dataset.uri, "--json", "--sample", "12", "--clips", "0"]) == 0
    here = capsys.readouterr().out
    changing = r'"dataset": "[^"]*"|"modified": "[^"]*"'
    assert re.sub(changing, "", there) == re.sub(changing, "", here)
    proxy.asked.clear()
    assert main(["inspect", s3_uri, "s1c3"]) == 0
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for method, asked in proxy.asked if asked]
    one_clip = sum(size for _, size in dataset.index().shards[1].clips[3].members.values())
    assert sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found) <= 1.1 * one_clip
    page = tmp_path / "r.html"
    assert main(["report", s3_uri, "-o", str(page), "--clips", "2"]) == 0
    assert page.read_text().count("<article") == 2
