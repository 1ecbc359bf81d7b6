"""Loops that numba compiles, librosa's and our own: made once per machine by one process, then only read.

numba stores what it compiles for the next process. When two workers fill that store at the same time, inner and outer
functions of different compilations can end up together, and calling them ends in a segmentation fault, now and in every
later process. So the store is filled in a folder of its own by a single process and appears under its name when whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError
from shards.storage import user_cache


def use_compiled_loops(fill: str, modules: Sequence[str]) -> None:
    """Point numba at the machine's finished store, filled first where there is none. No effect once numba is loaded.

    Args:
        fill: Python statements that make numba compile all that will be called.
        modules: where those loops are written, by their dotted names; a package stands for all it holds.

    Raises:
        UserError: the filling process failed.
    """
    if "numba" in sys.modules:
        return
    name = _store_name(fill, modules)
    home = user_cache()
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = open(home / ".lock", "a")  # noqa: SIM115 - closed by the block below
    except OSError:
        # No home to write to: a folder for this process alone, filled as it goes.
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="faces2voices-")
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / name).is_dir():
            partial = tempfile.mkdtemp(prefix=f"{name}-partial-", dir=home)
            try:
                environment = {**os.environ, "NUMBA_CACHE_DIR": partial}
                filled = subprocess.run([sys.executable, "-c", fill], env=environment, capture_output=True, text=True)
                if filled.returncode:
                    last = (filled.stderr.strip().splitlines() or [f"exit status {filled.returncode}"])[-1]
                    raise UserError(f"compiled loops for {home / name} could not be made: {last}")
                os.replace(partial, home / name)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    os.environ["NUMBA_CACHE_DIR"] = str(home / name)


def _store_name(fill: str, modules: Sequence[str]) -> str:
    """A name that changes with all that makes numba compile anew: it would do so inside a store that others read.

    numba knows a source file by its path, time and size, not by its bytes.
    """
    import llvmlite.binding

    digest = hashlib.sha256(fill.encode())
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no module {module}, whose loops are to be compiled", name=module)
        stat = Path(spec.origin).stat()
        digest.update(f"\0{spec.origin}\0{stat.st_mtime_ns}\0{stat.st_size}\0".encode())
        digest.update(Path(spec.origin).read_bytes())
    parts = [importlib.metadata.version(name) for name in ("librosa", "numba", "numpy")]
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    return "-".join(["loops", *parts, f"py{version}", llvmlite.binding.get_host_cpu_name(), digest.hexdigest()[:12]])
