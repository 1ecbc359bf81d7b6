"""Buckets that refuse or cannot be reached: one line, without a secret in it; credentials from files."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from shards.storage import (
    StorageError,
    open_store,
)
from tests.buckets import names, one_line, patience, setenv
from tests.seaweed import BUCKET, FULL, S3Server, aws_environment, free_ports

CALLS = {
    "read": lambda store: store.read("a"),
    "find": lambda store: store.find("a"),
    "list": lambda store: list(store.list()),
    "ranges": lambda store: store.read_ranges("a", [(0, 1)]),
    "open": lambda store: store.open("a"),
    "write": lambda store: store.write("b", b"1"),
    "swap": lambda store: store.swap("b", b"1", None),
    "delete": lambda store: store.delete(["a"]),
}
WRITES = ("write", "swap", "delete")


class TestRefusals:
    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("wrong", [{"AWS_SECRET_ACCESS_KEY": "WRONG"}, {"AWS_ACCESS_KEY_ID": "WRONG"}])
    def test_wrong_credentials(
        self,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
        wrong: dict[str, str],
        call: str,
    ) -> None:
        setenv(monkeypatch, **wrong)
        with pytest.raises(StorageError) as caught:
            CALLS[call](open_store(s3_uri))
        one_line(caught.value, "access denied", s3_uri)

    def test_a_key_that_may_only_read(
        self,
        s3_server: S3Server,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        open_store(s3_uri).write("a", b"1")
        setenv(monkeypatch, **s3_server.read_only_env)
        store = open_store(s3_uri)
        assert store.read("a") == b"1"
        assert names(store) == ["a"]
        for call in WRITES:
            with pytest.raises(StorageError) as caught:
                CALLS[call](store)
            one_line(caught.value, "access denied", s3_uri)
        assert names(store) == ["a"]

    @pytest.mark.parametrize("call", [call for call in CALLS if call != "delete"])
    def test_a_missing_bucket(self, s3_uri: str, call: str) -> None:
        with pytest.raises(StorageError) as caught:
            CALLS[call](open_store("s3://no-such-bucket/x"))
        one_line(caught.value, "no such bucket", "s3://no-such-bucket/x")

    def test_an_endpoint_that_does_not_answer(
        self,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        setenv(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_ports(1)[0]}")
        with pytest.raises(StorageError) as caught:
            open_store(s3_uri)
        one_line(caught.value, f"s3://{BUCKET}", "127.0.0.1")

    def test_no_credentials(self, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        patience(monkeypatch, RETRY_FOR=timedelta(seconds=0.2))
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        setenv(monkeypatch, AWS_METADATA_ENDPOINT=f"http://127.0.0.1:{free_ports(1)[0]}")
        with pytest.raises(StorageError) as caught:
            open_store(s3_uri).read("a")
        one_line(caught.value, "no credentials", s3_uri)


class TestProfiles:
    @pytest.mark.parametrize("profile", ["default", "lab"])
    @pytest.mark.parametrize("endpoint_in", ["environment", "config file"])
    def test_credentials_from_files(
        self,
        s3_server: S3Server,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        profile: str,
        endpoint_in: str,
    ) -> None:
        aws_environment(monkeypatch, {}, tmp_path)
        keys = f"[{profile}]\naws_access_key_id = {FULL[0]}\naws_secret_access_key = {FULL[1]}\n"
        (tmp_path / "credentials").write_text(keys)
        settings = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
        if endpoint_in == "environment":
            settings |= {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_REGION": "us-east-1"}
        else:
            section = "default" if profile == "default" else f"profile {profile}"
            text = f"[{section}]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n"
            (tmp_path / "config").write_text(text)
            settings |= {"AWS_CONFIG_FILE": str(tmp_path / "config")}
        if profile != "default":
            settings |= {"AWS_PROFILE": profile}
        setenv(monkeypatch, **settings)
        store = open_store(s3_uri)
        store.write("a", b"1")
        assert names(store) == ["a"]

    def test_a_wrong_secret_in_a_file(
        self,
        s3_server: S3Server,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        aws_environment(monkeypatch, {"AWS_ENDPOINT_URL": s3_server.endpoint}, tmp_path)
        keys = f"[default]\naws_access_key_id = {FULL[0]}\naws_secret_access_key = WRONG\n"
        (tmp_path / "credentials").write_text(keys)
        setenv(monkeypatch, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"))
        with pytest.raises(StorageError) as caught:
            open_store(s3_uri).read("a")
        one_line(caught.value, "access denied", s3_uri)


@pytest.mark.parametrize("scheme", ["", "ftp://", "https://"])
def test_an_endpoint_of_another_kind_is_one_line(
    s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """No scheme, a wrong one, and TLS spoken to a server without."""
    setenv(monkeypatch, AWS_ENDPOINT_URL=scheme + s3_server.endpoint.removeprefix("http://"))
    with pytest.raises(StorageError, match=rf"^s3://{BUCKET}: .*127\.0\.0\.1[^\n]*$"):
        open_store(s3_uri)


def test_a_profile_that_is_not_there_is_one_line(s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[profile one]\nregion = us-east-1\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    setenv(monkeypatch, AWS_CONFIG_FILE=str(tmp_path / "config"), AWS_PROFILE="nope")
    with pytest.raises(StorageError) as caught:
        open_store(s3_uri)
    one_line(caught.value, "nope")
