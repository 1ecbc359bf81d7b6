"""The folder of a training run, on disk or in a bucket: TensorBoard events and small notes beside the checkpoints."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from model.checkpoint import as_uri
from shards.errors import UserError, warn
from shards.storage import StorageError, is_remote, is_web, local_path, open_store

ROTATE = 8 << 20
"""Bytes after which a new event file is begun: a bucket takes objects whole, so what was sent is sent again."""


class RunFolder:
    """Where a run writes.

    Event files have names of their own in every run, so those of runs that were stopped stay beside the new ones.

    Attributes:
        uri: of the folder, without a slash at its end.
        is_local: whether it lies on disk.

    Raises:
        UserError: a URI that cannot be written to.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = as_uri(uri)
        if is_web(self.uri):
            raise UserError(f"{self.uri}: a web server is only read; name a local folder or a bucket")
        self.is_local = not is_remote(self.uri)
        if self.is_local:
            self.uri = str(local_path(self.uri))
            if Path(self.uri).exists() and not Path(self.uri).is_dir():
                raise UserError(f"{self.uri}: is no folder")
        self._store = open_store(self.uri)
        self._writer: SummaryWriter | None = None
        self._folder: Path | None = None
        self._sent: dict[str, int] = {}

    def writer(self, purge_step: int) -> SummaryWriter:
        """Open an event file. TensorBoard forgets events of earlier files from `purge_step` on.

        In a bucket nothing appears before `sync`.
        """
        self.close()
        self._folder = Path(self.uri if self.is_local else tempfile.mkdtemp(prefix="f2v-events-"))
        # Two machines made from one image may share host name, process number and second.
        own = f".{secrets.token_hex(4)}"
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step, filename_suffix=own)
        return self._writer

    def sync(self) -> None:
        """Bring the events written so far to the folder. Where a bucket does not take them, that is a warning, and the
        next call sends them."""
        if self._writer is None:
            return
        self._writer.flush()
        if not self.is_local:
            self._send()

    def note(self, name: str, text: str) -> str:
        """Write a small text file, whole or not at all.

        Returns:
            Where it lies.

        Raises:
            StorageError: the bucket does not take it.
        """
        self._store.write(name, text.encode())
        return f"{self.uri}/{name}"

    def close(self) -> None:
        """End the event file. Events that a bucket does not take stay where they are, which a warning names."""
        if self._writer is None or self._folder is None:
            return
        self._writer.close()
        self._writer = None
        if not self.is_local and self._send():
            for path in self._folder.iterdir():
                path.unlink()
            self._folder.rmdir()

    def _send(self) -> bool:
        """Send the event files that grew. Whether all of them lie in the bucket now."""
        assert self._folder is not None
        try:
            for path in sorted(self._folder.iterdir()):
                size = path.stat().st_size
                if self._sent.get(path.name) == size:
                    continue
                self._store.write(path.name, path.read_bytes())
                self._sent[path.name] = size
                if size > ROTATE and self._writer is not None:
                    # A closed SummaryWriter opens the next file by itself.
                    self._writer.close()
        except (OSError, StorageError) as error:
            warn(f"{self.uri}: events are kept in {self._folder} for now ({error})")
            return False
        return True
