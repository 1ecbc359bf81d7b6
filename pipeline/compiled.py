"""Compiled loops of librosa: made once per machine by one process, then only read.

numba stores what it compiles for the next process. When two workers fill that store at the same time, inner and outer
functions of different compilations can end up together, and calling them ends in a segmentation fault, now and in every
later process. So the store is filled in a folder of its own by a single process and appears under its name when whole.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile

from shards.storage import user_cache


def use_compiled_loops(fill: str) -> None:
    """Point numba at the machine's finished store, filled first where there is none. No effect once numba is loaded.

    Args:
        fill: Python statements that make numba compile all that will be called.

    Raises:
        subprocess.CalledProcessError: the filling process failed.
    """
    if "numba" in sys.modules:
        return
    import llvmlite.binding

    parts = [importlib.metadata.version(name) for name in ("librosa", "numba", "numpy")]
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    name = "-".join(["loops", *parts, f"py{version}", llvmlite.binding.get_host_cpu_name()])
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
                subprocess.run([sys.executable, "-c", fill], check=True, env=environment, capture_output=True)
                os.replace(partial, home / name)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    os.environ["NUMBA_CACHE_DIR"] = str(home / name)
