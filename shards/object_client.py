"""Clients of buckets, and the words for their errors.

Credentials come from where the provider's own tools look: environment variables, profile files (read by boto3),
instance and pod roles. They stay inside the client.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import threading
import time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from obstore import exceptions, store

from shards.storage import StorageError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
KNOCKS = 3
ROLES = ("/latest/api/token", "/latest/meta-data/", "/computeMetadata/")
"""Where a provider's machines ask for the role they run with: the last place to find credentials in."""


@lru_cache
def client(scheme: str, bucket: str, timeout: timedelta, retry_for: timedelta) -> Any:
    """The process's client of a bucket.

    Args:
        scheme: `s3` or `gs`.
        timeout: for one request.
        retry_for: how long a request is repeated.

    Raises:
        StorageError: nobody listens at the endpoint that the environment or a profile names.
    """
    options: dict[str, Any] = {
        "client_options": {"timeout": timeout, "connect_timeout": timedelta(seconds=5)},
        # Time alone ends the retries. The wait before each is drawn from 0.1 s to `base` times the one before.
        "retry_config": {
            "max_retries": 1000,
            "retry_timeout": retry_for,
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 4},
        },
    }
    if scheme == "gs":
        return store.GCSStore(bucket, **options)
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    if "AWS_ACCESS_KEY_ID" not in os.environ and _profile_files():
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            session = boto3.Session()
            if session.get_credentials() is not None:
                endpoint = endpoint or session._session.get_scoped_config().get("endpoint_url")
                options["region"] = session.region_name or "us-east-1"
                options["credential_provider"] = Boto3CredentialProvider(session)
        except BotoCoreError as error:
            raise StorageError(f"{scheme}://{bucket}: credentials: {' '.join(str(error).split())}") from None
    if endpoint:
        _knock(endpoint, f"{scheme}://{bucket}")
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    return store.S3Store(bucket, **options)


@lru_cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The process's loop for requests that can be cancelled; it runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="bucket", daemon=True).start()
    return loop


def _knock(endpoint: str, where: str) -> None:
    """Raise StorageError where no such server listens: the client would try for minutes, deaf to Ctrl-C."""
    try:
        parts = urlsplit(endpoint)
        usual = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or usual
        host = parts.hostname or ""
    except (ValueError, KeyError):
        hint = "expected https://host or http://host:port"
        raise StorageError(f"{where}: endpoint {endpoint.split('@')[-1]!r}; {hint}") from None
    if getproxies():
        return
    for attempt in range(KNOCKS):
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                if parts.scheme == "https":
                    # Whose certificate it is, the client checks; here only that it speaks TLS at all.
                    context = ssl.create_default_context()
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                    context.wrap_socket(connection, server_hostname=host).close()
            return
        except OSError as error:
            if attempt == KNOCKS - 1:
                raise StorageError(f"{where}: no answer from {parts.scheme}://{host}:{port} ({error})") from None
            time.sleep(0.3)


def _profile_files() -> bool:
    files = [
        Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")),
        Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")),
    ]
    return any(file.expanduser().is_file() for file in files)


def describe(error: Exception) -> str:
    """One short line of an error; answers of the server stay out, since some repeat a session token."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if code and code[1] == "NoSuchBucket":
        return "no such bucket; make it or correct the URI"
    if any(path in text for path in ROLES):
        return "no credentials found; set them in the environment or a profile, or run with a role"
    # Listing and deleting many give the general exception where others have one of their own.
    denied = isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
    if denied or "403 Forbidden" in text or "AccessDenied" in text:
        return "access denied; check the credentials (environment, profile or role) and the bucket's policy"
    line = " ".join(re.split(r"[<\n]", text, maxsplit=1)[0].split())[:200]
    return f"{line} ({code[1]})" if code else line
