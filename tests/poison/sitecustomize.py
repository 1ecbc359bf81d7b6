"""Stages that misbehave, or take no time, in every Python process that has this folder on PYTHONPATH.

Ray's workers inherit PYTHONPATH from their node, so the code under test has no hook of its own. F2V_STAGES names a JSON
file, read when the module of a stage is imported:

    {"faults": [{"stage": "energy", "key": "train/s1/bbaf2n", "what": "segfault"}], "trivial": false}

The key "" stands for the set-up of the stage, the stage "codebook" for the fit of centroids, where it encodes the sound
of the clip. A fault may have `once`: a path; it happens to whoever creates that file, who leaves F2V_TEST_RUN of its
environment in it, and never again. `what` is one of `FAULTS`. With `trivial`, every stage gives clips of two frames,
filled with zeros, without any network. With `first`, a path, the first clip that comes out of a stage anywhere leaves
the time there.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = str(Path(__file__).resolve().parent)
FRAMES = 2
STAGES = "pipeline.stages."
FIT = "pipeline.codebook"


def hang(fault: dict[str, Any]) -> None:
    """Python code that never ends."""
    import time

    while True:
        time.sleep(0.1)


def hang_in_c(fault: dict[str, Any]) -> None:
    """Native code that never returns and never lets another thread run Python."""
    import ctypes

    while True:
        ctypes.PyDLL(None).pause()


def segfault(fault: dict[str, Any]) -> None:
    """A read from address 0."""
    import ctypes

    ctypes.string_at(0)


def abort(fault: dict[str, Any]) -> None:
    """What a failed assertion in native code does."""
    os.abort()


def leave(fault: dict[str, Any]) -> None:
    """A library that ends the process."""
    os._exit(3)


def kill(fault: dict[str, Any]) -> None:
    """What the kernel does to a process that it chooses when memory runs out."""
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def memory(fault: dict[str, Any]) -> None:
    """Memory that grows to `gb` (default 2) within seconds, and stays."""
    import time

    held: list[bytes] = []
    while True:
        if len(held) < 16 * fault.get("gb", 2):
            held.append(b"\1" * (64 << 20))
        time.sleep(0.05)


def reject(fault: dict[str, Any]) -> None:
    """The undisturbed build without this clip: the stage refuses it."""
    from pipeline.stage import Reason, Reject

    raise Reject(Reason.FAULT, "refused to have a build without this clip")


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "hang": hang,
    "hang_in_c": hang_in_c,
    "segfault": segfault,
    "abort": abort,
    "exit": leave,
    "kill": kill,
    "memory": memory,
    "reject": reject,
}


def suffer(faults: Sequence[dict[str, Any]], key: str) -> None:
    """What is laid upon the clip `key`, if anything."""
    for fault in faults:
        if fault["key"] != key:
            continue
        if "once" in fault:
            try:
                with open(fault["once"], "x") as file:
                    file.write(os.environ.get("F2V_TEST_RUN", "") + "\n")
            except FileExistsError:
                continue
        FAULTS[fault["what"]](fault)


def poison(kind: Any, faults: Sequence[dict[str, Any]]) -> None:
    """Lay faults upon a stage: where it starts on the clip, or, where it works on batches, takes it into one."""
    setup = kind.setup

    def poisoned_setup(stage: Any) -> None:
        suffer(faults, "")
        setup(stage)

    kind.setup = poisoned_setup
    if "process" in vars(kind):
        _poison_batches(kind, faults)
        return
    run = kind.run

    def poisoned(stage: Any, item: Any) -> Any:
        suffer(faults, item.clip.key)
        return run(stage, item)

    kind.run = poisoned


def _poison_batches(kind: Any, faults: Sequence[dict[str, Any]]) -> None:
    from pipeline.stage import Reject, Rejection

    process = kind.process
    refused = {fault["key"] for fault in faults if fault["what"] == "reject"}

    def poisoned(stage: Any, items: Iterable[Any]) -> Iterator[Any]:
        source = iter(items)
        for first in source:
            stopped: list[Any] = []

            def before(first: Any = first, stopped: list[Any] = stopped) -> Iterator[Any]:
                item = first
                while item.clip.key not in refused:
                    suffer(faults, item.clip.key)
                    yield item
                    item = next(source, None)
                    if item is None:
                        return
                stopped.append(item)

            yield from process(stage, before())
            for item in stopped:
                try:
                    suffer(faults, item.clip.key)
                except Reject as error:
                    yield item, Rejection(error.reason, str(error))

    kind.process = poisoned


def poison_fit(module: ModuleType, faults: Sequence[dict[str, Any]]) -> None:
    """Lay faults upon the encoder of the fit. The sound that it is given is of the clips that were read last; those
    that are to be refused are left out."""
    from dataclasses import replace

    fit, read, make = module.fit, module.read_members, module.make_encoder
    refused = {fault["key"] for fault in faults if fault["what"] == "reject"}
    heard: list[str] = []

    def noted_read(dataset: Any, column: Any, keys: Sequence[str], names: Sequence[str]) -> Any:
        heard.extend(keys if "wav" in names else ())
        return read(dataset, column, keys, names)

    def poisoned_make(*args: Any) -> Any:
        encoder = make(*args)
        encode = encoder.encode

        def poisoned(*args: Any) -> Any:
            keys = [*heard]
            heard.clear()
            for key in keys:
                suffer(faults, key)
            return encode(*args)

        encoder.encode = poisoned
        return encoder

    def fit_without(dataset: Any, task: Any, config: Any, care: Any) -> Any:
        return fit(dataset, task, config, replace(care, skipped={*care.skipped, *refused}))

    vars(module).update(read_members=noted_read, make_encoder=poisoned_make, fit=fit_without)


def make_trivial(kind: Any) -> None:
    """A stage that gives the same small fields for every clip."""
    import numpy as np

    from pipeline.stage import Stage
    from shards.schema import FIELDS

    lengths: dict[int | str, int] = {"F": FRAMES, "2F": 2 * FRAMES, "640F": 640 * FRAMES}

    def value(name: str) -> Any:
        field = FIELDS[name]
        shape = [part if isinstance(part, int) else lengths.get(part, 8) for part in field.shape]
        return {} if field.encoding == "json" else np.zeros(shape, field.dtype)

    kind.run = lambda stage, item: {name: value(name) for name in stage.gives()}
    kind.process = Stage.process
    kind.setup = lambda stage: None
    kind.weights = lambda stage: ()


def note_first(kind: Any, path: str) -> None:
    """Write Unix time to `path` when the first clip has come out, unless another stage was faster."""
    process = kind.process

    def noted(stage: Any, items: Iterable[Any]) -> Iterator[Any]:
        import time

        results = iter(process(stage, items))
        for result in results:
            with contextlib.suppress(FileExistsError), open(path, "x") as file:
                file.write(str(time.time()))
            yield result
            break
        yield from results

    kind.process = noted


def change(module: ModuleType, plan: dict[str, Any]) -> None:
    """Change the stage that a module defines, or the fit."""
    if module.__name__ == FIT:
        faults = [fault for fault in plan.get("faults", ()) if fault["stage"] == "codebook"]
        if faults:
            poison_fit(module, faults)
        return
    name = module.__name__.removeprefix(STAGES)
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__ and vars(kind).get("name") == name:
            if plan.get("trivial"):
                make_trivial(kind)
            faults = [fault for fault in plan.get("faults", ()) if fault["stage"] == name]
            if faults:
                poison(kind, faults)
            if "first" in plan:
                note_first(kind, plan["first"])


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of stages, and that of the fit, as Python does, and changes them after they have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(STAGES) and name != FIT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None and Path(os.environ["F2V_STAGES"]).exists():
            import json

            plan = json.loads(Path(os.environ["F2V_STAGES"]).read_text())
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                change(module, plan)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _others() -> None:
    """Run the sitecustomize that this one hides, if there is one."""
    paths = [path for path in sys.path if os.path.realpath(path or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_others()
if "F2V_STAGES" in os.environ:
    sys.meta_path.insert(0, Finder())
