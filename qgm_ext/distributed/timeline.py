"""Timelines: what the workers do in their steps, as one Chrome trace that shows computing and communication.

torch.profiler records it, so a trace holds the operators of the model, autograd and the kernels of this package, too.
What the profiler does not know is added here: which bucket is sent or waited for (:func:`span`), and one file for all
workers (:func:`trace`). It opens in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd import profiler

from qgm_ext.distributed.agreement import collective_device, gather_bytes
from qgm_ext.files import naming

if TYPE_CHECKING:
    from qgm_ext.distributed.exchange import Stamp

__all__ = ["span", "trace", "trace_steps"]

_UNTRACED = 2  # in its first step an optimizer makes its buffers, and in the second it reads them for the first time
_NOTHING = contextlib.nullcontext()
_IN_FLIGHT = ("gloo:", "nccl:")  # how torch names messages, from their start until they were waited for


def span(name: str, stamp: Stamp, peer: int | None = None) -> contextlib.AbstractContextManager[Any]:
    """A stretch of time in traces of torch.profiler; nothing while none is active.

    Args:
        name: what is done.
        stamp, peer: to which messages, and whose; the name says it.
    """
    if not profiler._is_profiler_enabled:  # record_function costs some microseconds even if nobody listens
        return _NOTHING
    whose = "" if peer is None else f" {peer}"
    part = f" pass {stamp.part}" if stamp.part else ""
    return profiler.record_function(f"qgm_ext: {name}{whose} bucket {stamp.bucket}{part}")


@contextlib.contextmanager
def trace(path: str | os.PathLike[str], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Record what is done in the context by all workers; leaving it, which is a collective, rank 0 writes the file.

    One row per worker (pid is its rank) shows its threads: ``qgm_ext: send bucket 3``, ``qgm_ext: wait for 1 bucket 3``
    (worker 1), ``qgm_ext::local_step_`` and ``qgm_ext::merge_``, ``Optimizer.step``, all operators; rows of their own
    show the messages in flight, ``gloo:send`` and ``gloo:recv``, each until it was waited for. With overlap=True local
    steps and sends lie between operators of backward. Recording slows every operator down by some microseconds, most of
    all small ones. Times of workers on one machine are of one clock; on several they agree as well as the machines'
    clocks do.

    Args:
        path: of the file, Chrome trace format; written by rank 0 only, and not if the context is left by an error.
        group: the workers; None for the default group, or for a worker alone.

    Raises:
        OSError: on rank 0, if the file can't be written.

    Example:
        >>> import tempfile, qgm_ext
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with qgm_ext.distributed.trace(f"{folder}/trace.json"):
        ...         _ = torch.ones(2) + 1
        ...     "aten::add" in Path(folder, "trace.json").read_text()
        True
    """
    with torch.profiler.profile() as recorded:
        yield
    several = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if several else (0, 1)
    mine = _recorded(recorded, rank, size)
    found = [mine]
    if several:
        packed = zlib.compress(json.dumps(mine).encode(), 1)
        every = gather_bytes(group, packed, collective_device(group), only_first=True)
        found = [json.loads(zlib.decompress(text)) for text in every]
    if rank > 0:
        return
    events = []
    for one in found:
        shift = (one["base"] - found[0]["base"]) / 1e3
        events += [{**event, "ts": event["ts"] + shift} for event in one["events"]]
    first = min((event["ts"] for event in events if event["ph"] != "M"), default=0.0)
    for event in events:
        event["ts"] = 0.0 if event["ph"] == "M" else round(event["ts"] - first, 3)
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
    with naming(Path(path)):
        Path(path).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def trace_steps(path: str | os.PathLike[str], steps: int) -> Iterator[Callable[[], None]]:
    """:func:`trace` so many of the steps taken in the context, from the third on, or those that there are.

    Yields what every worker must call after each step.
    """
    with contextlib.ExitStack() as tracing:
        taken = 0

        def after_step() -> None:
            nonlocal taken
            taken += 1
            if taken == _UNTRACED:
                tracing.enter_context(trace(path))
            elif taken == _UNTRACED + steps:
                tracing.close()

        yield after_step


def _recorded(recorded: torch.profiler.profile, rank: int, size: int) -> dict[str, Any]:
    """The events of this worker, its process renamed to its rank, and the time in ns that theirs count from."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        content = json.loads(file.read_text(encoding="utf-8"))
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "ts": 0, "args": {"name": f"worker {rank}"}},
        {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "ts": 0, "args": {"sort_index": rank}},
    ]
    for event in content["traceEvents"]:
        pid = event.get("pid")
        if not isinstance(pid, int) or event["name"] in ("process_name", "process_sort_index"):
            continue  # of the profiler itself
        event["pid"] = (
            rank if pid == os.getpid() else (pid + 1) * size + rank
        )  # the rows of devices are numbered from 0
        if event["ph"] == "X" and event["name"].startswith(_IN_FLIGHT):
            # Messages overlap, which "X" events of one thread must not.
            name = {"cat": "message", "name": event["name"], "id": f"{rank}.{len(events)}"}
            place = {"pid": event["pid"], "tid": event["tid"]}
            events.append({"ph": "b", "ts": event["ts"], **name, **place, "args": event.get("args", {})})
            events.append({"ph": "e", "ts": event["ts"] + event["dur"], **name, **place})
        else:
            if event["ph"] in "sf" and "id" in event:  # arrows must not lead to another worker
                event["id"] = f"{rank}.{event['id']}"
            events.append(event)
    return {"base": content.get("baseTimeNanoseconds", 0), "events": events}
