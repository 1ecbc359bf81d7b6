"""The worker process of a stream: takes jobs from its socket, fills rows of shared batches, says when it is done.

It gets everything by two open files and the socket alone: started as a program of its own, it inherits no thread, no
lock and no client of the training process, and it ends when that one does, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import signal
import traceback
from collections import OrderedDict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.fill import DamagedSample, Filler, Sample
from shards.layout import layout
from shards.stream_config import StreamConfig

MAPPED = 64
"""Slots that are kept mapped; more exist only while the training job holds on to many batches."""


def main(socket: int, memory: int) -> None:
    """Serve until the other side of `socket` closes; `memory` is the file that the batches lie in."""
    # Ctrl-C and a batch system's SIGTERM reach every process; the training loop alone decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = Connection(socket)
    with contextlib.suppress(EOFError, ConnectionError):
        serve(line, memory)


def serve(line: Connection, memory: int) -> None:
    first = json.loads(line.recv_bytes())
    config = StreamConfig.model_validate(first["config"])
    widths = tuple(sorted(first["widths"].items()))
    filler = Filler(config, first["seed"], first["widths"])
    slots: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
    while True:
        job = json.loads(line.recv_bytes())
        slot = job["slot"]
        if slot not in slots:
            if len(slots) >= MAPPED:
                slots.popitem(last=False)
            slots[slot] = np.frombuffer(
                mmap.mmap(memory, first["slot_bytes"], offset=slot * first["slot_bytes"]), np.uint8
            )
        shape = layout(job["rows"], job["frames"], widths, config.augment_on == "worker", config.fields)
        views = shape.views(slots[slot])
        line.send_bytes(json.dumps({"job": job["job"], **fill_rows(filler, views, job)}).encode())


def fill_rows(filler: Filler, views: dict[str, NDArray[Any]], job: dict[str, Any]) -> dict[str, Any]:
    """Fill rows `first` and on with the samples of a job; what went wrong, if anything did."""
    filler.close_deleted()
    for row, fields in enumerate(job["samples"], job["first"]):
        sample = Sample(**fields)
        try:
            filler.fill(views, row, sample)
        except DamagedSample as error:
            return {"damaged": str(error), "shard": (sample.dataset, sample.shard)}
        except Exception:
            return {"fault": traceback.format_exc()}
    return {}
