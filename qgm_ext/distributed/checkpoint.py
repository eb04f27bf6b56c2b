"""Checkpoints of workers in processes of their own, and the average of their models.

Every worker writes what it needs to go on into a folder of its own with torch.distributed.checkpoint, beside its place,
flushed, and renamed: FOLDER/step-00000120/worker-3-of-8. Nobody waits for anybody, and kill -9 of any or all workers at
any moment leaves whole folders only. A step counts as saved when all its workers are there, and :func:`load` takes the
last step that is; what is lost with a machine or its disk is replaced by a neighbour's
(:mod:`qgm_ext.distributed.takeover`). torch.distributed.checkpoint runs without its collectives, which would send
pickled plans among the workers.

Only tensors go through it; all else of an optimizer's state is JSON, with a checksum of every tensor.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as _torch_checkpoint

from qgm_ext.distributed.agreement import collective_device, gather_json
from qgm_ext.distributed.peer_loss import global_rank, meeting
from qgm_ext.distributed.takeover import Sources, State, checksum, choose, hand_over
from qgm_ext.files import sync_folder, write_atomically
from qgm_ext.optim import DecentralizedOptimizer
from qgm_ext.optim.entries import with_numbers

__all__ = ["Loaded", "consensus_model", "discard_others", "export_safetensors", "load", "save"]

dcp: Any = _torch_checkpoint  # names its functions in a way that type checkers take for private

_FORMAT = "qgm_ext.worker/1"
_ABOUT = "about.json"
_KEPT = 2  # whole steps; the last but one stays until the next is whole
_STEP = re.compile(r"step-(\d{8,})")
_WORKER = re.compile(r"worker-(\d+)-of-(\d+)")
_BEGUN = re.compile(r"\.worker-(\d+)-of-(\d+)\.json")
_logger = logging.getLogger("qgm_ext.distributed")


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Args:
        step: that the checkpoint is of.
        extra: what was saved with it.
        resumed: True: as it was saved; False: from the average of another number of workers, with the optimizer's
            state at its start.
        note: what a user should know; empty if there is nothing, and the training goes on to the same bits.
        taken: the workers whose state is lost, and whose each of them has taken up, ``extra`` included.
    """

    step: int
    extra: dict[str, Any]
    resumed: bool
    note: str
    taken: dict[int, int] = field(default_factory=dict)


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    extra: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save this worker; to be called by every worker after the same step.

    Saves parameters and buffers of the model, the optimizer's state, and the state of torch's random numbers on the
    CPU. What this worker saved before the last two whole steps is removed; where a machine sees only some of the
    workers, a step is whole for it when all of these have saved it.

    Args:
        folder: of all checkpoints of the run; shared by the workers or each machine's own.
        model, optimizer: what to save.
        step: how many steps were done.
        extra: numbers, strings, lists, dicts with strings as keys, None, and tensors: whatever else there is to keep.
        group: the workers; None for the default group.

    Returns:
        The folder that was written.

    Raises:
        TypeError, ValueError: if step or extra does not fit.
        OSError: if it can't be written; earlier checkpoints are as they were.
    """
    rank, size = _place(group)
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an integer, got {step!r}")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    tensors: dict[str, Tensor] = {}
    content = {
        "format": _FORMAT,
        "step": step,
        "rank": rank,
        "workers": size,
        "model": _pack("model", model.state_dict(), tensors),
        "optimizer": _pack("optimizer", optimizer.state_dict(), tensors),
        "extra": _pack("extra", dict(extra or {}), tensors),
        "random": _pack("random", torch.get_rng_state(), tensors),
    }
    content["checksums"] = {key: checksum(tensor) for key, tensor in tensors.items()}
    root = Path(folder)
    target = root / f"step-{step:08d}" / f"worker-{rank}-of-{size}"
    temporary = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs without collectives, which is meant
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    text = json.dumps(content, allow_nan=True).encode()
    write_atomically(temporary / _ABOUT, lambda file: file.write(text))
    if target.exists():  # the same step again, as after resuming from an earlier one: the bits are the same
        shutil.rmtree(target)
    os.rename(temporary, target)
    for parent in (target.parent, root):
        sync_folder(parent)
    start = _started(root, rank, size)
    lost = sorted(optimizer.lost_workers) if isinstance(optimizer, DecentralizedOptimizer) else []
    now: dict[str, Any] = {"start": "" if start is None else start["start"], "saved": True, "lost": lost}
    if start != now:
        _write_start(root, rank, size, now)
    _remove_old(root, rank, size, now["start"], set(lost))
    return target


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    group: dist.ProcessGroup | None = None,
) -> Loaded | None:
    """Take up the last step that all workers have saved; a collective, also for the first start of a training.

    With as many workers as saved it, each goes on to the same bits, on whatever machine its state is. Is that of some
    worker left on none (another disk, another machine), the worker takes up that of a neighbour that has saved the
    step, random numbers excepted: ``note``, ``taken`` and a line in the log of the worker say so. Algorithms whose
    state is a part of a sum over workers refuse that (:attr:`qgm_ext.algorithms.Algorithm.can_copy_workers`).

    With another number of workers all start from the average of the saved models (which must all be visible to every
    worker), with the optimizer as it is: momentum belongs to a worker that is no more, so it starts anew. ``note`` says
    so.

    Called before there is anything to take up, it notes that the workers have begun, so that a worker that died before
    it first saved is told from one whose files are lost.

    Args:
        folder: as in :func:`save`.
        model, optimizer: built as when it was saved; model and optimizer state are overwritten.
        group: the workers; None for the default group.

    Returns:
        What was loaded, or None if no step is whole.

    Raises:
        ValueError: if a checkpoint is damaged or does not fit the model or the optimizer, or a worker's state is lost
            and the algorithm can't go on with another's; it is named.
        PeerLostError: if a worker is gone.
        OSError: if the folder can't be written to.
    """
    rank, size = _place(group)
    root = Path(folder)
    device = _device(group)
    saved = _saved(root)
    begun = _started(root, rank, size)
    others = [(step, n) for step, found in saved.items() for n, ranks in found.items() if len(ranks) == n != size]
    said: dict[str, Any] = {
        "seen": [[step, sorted(workers[size])] for step, workers in saved.items() if size in workers],
        "of_others": [step for step, _ in others],
        "unsaved": begun is not None and not begun["saved"],
        "lost": [] if begun is None else begun.get("lost", []),
        "start": secrets.token_hex(8),
    }
    every = [said] if size == 1 else gather_json(group, said, device)
    lost = {worker for one in every for worker in one["lost"]}  # the others have gone on without it
    sources = choose(
        [dict(one["seen"]) for one in every],
        [worker for worker, one in enumerate(every) if one["unsaved"] and worker not in lost],
        optimizer.topology if isinstance(optimizer, DecentralizedOptimizer) else None,
    )
    _write_start(root, rank, size, {"start": every[0]["start"], "saved": sources is not None})
    # An odd one out: a whole step of another number of workers, if it is newer, or the only one.
    other = set.intersection(*(set(one["of_others"]) for one in every))
    if sources is not None and sources.step >= max(other, default=0):
        return _take_up(root, model, optimizer, sources, group)
    if not other:
        return None
    step = max(other)
    n = max(n for found, n in others if found == step)
    paths = [root / f"step-{step:08d}" / f"worker-{i}-of-{n}" for i in range(n)]
    average, extra = _average(paths)
    _fit(paths[0], "model", lambda: model.load_state_dict(average))
    note = (
        f"{root} was saved by {n} workers at step {step}, now there are {size}: all start from the average of the "
        "saved models, with fresh optimizer state"
    )
    return Loaded(step, extra, False, note)


def _take_up(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sources: Sources,
    group: dist.ProcessGroup | None,
) -> Loaded:
    """Take up a state that was saved by as many workers."""
    rank, size = _place(group)
    if sources.taken and isinstance(optimizer, DecentralizedOptimizer):
        for param_group in optimizer.param_groups:
            algorithm = optimizer.make_algorithm(with_numbers(param_group))
            if not algorithm.can_copy_workers:
                lost = ", ".join(map(str, sources.taken))
                raise ValueError(
                    f"{root} has lost the state of worker {lost} of {size} at step {sources.step}, and with "
                    f"{algorithm.name} none can take up a neighbour's: state is a part of a sum over all workers. "
                    "Bring the files back, or remove what is left to start anew"
                )

    def path(worker: int) -> Path:
        return root / f"step-{sources.step:08d}" / f"worker-{worker}-of-{size}"

    content, tensors = hand_over(sources, lambda worker: _read(path(worker)), group, _device(group))
    owner = sources.owners[rank]
    _fit(path(owner), "model", lambda: model.load_state_dict(_unpack(content["model"], tensors)))
    _fit(path(owner), "optimizer", lambda: optimizer.load_state_dict(_unpack(content["optimizer"], tensors)))
    if owner == rank:
        torch.set_rng_state(_unpack(content["random"], tensors))
    else:
        _logger.warning("rank %d of %d takes up the state of worker %d of step %d", rank, size, owner, sources.step)
    taken = ", ".join(f"worker {worker} takes up that of worker {other}" for worker, other in sources.taken.items())
    note = f"{root} has not the state of every worker of step {sources.step} any more: {taken}" if taken else ""
    return Loaded(sources.step, _unpack(content["extra"], tensors), True, note, sources.taken)


def discard_others(folder: str | os.PathLike[str], workers: int) -> None:
    """Remove what other numbers of workers than ``workers`` have saved, the oldest first.

    For runs whose steps count less after such a change, so that :func:`load` could take an old step for a newer one.
    Any of the workers may call it, once a step of theirs is whole.
    """
    root = Path(folder)
    for step, found in _saved(root).items():
        for size, ranks in found.items():
            for rank in ranks if size != workers else ():
                _remove(root, step, rank, size)


def consensus_model(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Return a copy of the model with the average of all workers' parameters and buffers; a collective.

    Averaged in float64 and rounded once; integer buffers are worker 0's. All workers get the same bits.

    Args:
        model: this worker's.
        group: the workers; None for the default group.

    Raises:
        PeerLostError: if a worker is gone.
    """
    average = copy.deepcopy(model)
    _, size = _place(group)
    if size == 1:
        return average
    root = global_rank(group, 0)
    with torch.no_grad(), meeting(group):
        for tensor in average.state_dict().values():
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_floating_point():
                total = tensor.double()
                dist.all_reduce(total, group=group)
                tensor.copy_(total / size)
            else:
                dist.broadcast(tensor, root, group=group)
    return average


def export_safetensors(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's parameters and buffers to a safetensors file, in one go.

    Tensors that share memory are written once under their first name, as ``safetensors.torch.save_model`` does, and
    ``safetensors.torch.load_model`` reads them back.

    Args:
        model: e.g. that of :func:`consensus_model`; call it on one worker only.
        path: of the file.

    Raises:
        ModuleNotFoundError: if safetensors is missing; names the extra that brings it.
        OSError: if it can't be written; what was there is unchanged.
    """
    try:
        from safetensors.torch import save as serialize
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("export_safetensors needs safetensors: pip install 'qgm_ext[export]'") from error
    unique: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        # Cloned, for a parameter is a view of a buffer that holds all of them.
        unique[name] = tensor.detach().cpu().contiguous().clone()
    data = serialize(unique, metadata={"format": "pt"})
    write_atomically(Path(path), lambda file: file.write(data))


# Folders --------------------------------------------------------------------------------------------------------------


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _saved(root: Path) -> dict[int, dict[int, set[int]]]:
    """Who has saved: step -> number of workers -> ranks, ascending in the step."""
    found: dict[int, dict[int, set[int]]] = {}
    if not root.is_dir():
        return found
    for folder in root.iterdir():
        match = _STEP.fullmatch(folder.name)
        if match is None:
            continue
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):  # another worker may have just removed it
            names = os.listdir(folder)
        for name in names:
            worker = _WORKER.fullmatch(name)
            if worker is not None:
                found.setdefault(int(match[1]), {}).setdefault(int(worker[2]), set()).add(int(worker[1]))
    return dict(sorted(found.items()))


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend wants tensors of collectives."""
    return collective_device(group) if _place(group)[1] > 1 else torch.device("cpu")


def _started(root: Path, rank: int, size: int) -> dict[str, Any] | None:
    """What :func:`load` has noted of a worker here: in which start of all of them, and whether it has saved since."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # the latter: damaged, which is as good as none
        found = json.loads((root / f".worker-{rank}-of-{size}.json").read_bytes())
        if isinstance(found, dict) and isinstance(found.get("start"), str) and isinstance(found.get("saved"), bool):
            return found
    return None


def _write_start(root: Path, rank: int, size: int, start: Mapping[str, Any]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    text = json.dumps(start).encode()
    write_atomically(root / f".worker-{rank}-of-{size}.json", lambda file: file.write(text))


def _remove_old(root: Path, rank: int, size: int, start: str, lost: set[int]) -> None:
    """Remove this worker's folders of steps that are older than the last whole ones: of the workers whose files are
    here, and that are not lost.
    """
    here = {rank}
    for name in os.listdir(root):
        match = _BEGUN.fullmatch(name)
        if match is not None and int(match[2]) == size:
            found = _started(root, int(match[1]), size)
            if found is not None and found["start"] == start:
                here.add(int(match[1]))
    here -= lost
    saved = _saved(root)
    whole = [step for step, found in saved.items() if here <= found.get(size, set())]
    for step, workers in saved.items():
        if len(whole) >= _KEPT and step < whole[-_KEPT] and rank in workers.get(size, ()):
            _remove(root, step, rank, size)


def _remove(root: Path, step: int, rank: int, size: int) -> None:
    shutil.rmtree(root / f"step-{step:08d}" / f"worker-{rank}-of-{size}", ignore_errors=True)
    with contextlib.suppress(OSError):  # others are still in it, or it is gone
        (root / f"step-{step:08d}").rmdir()


# Content --------------------------------------------------------------------------------------------------------------


def _pack(place: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; its tensors go into ``tensors`` under a name that says where they were."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if isinstance(value, Mapping):
        pairs = [[key, _pack(f"{place}.{key}", item, tensors)] for key, item in value.items()]
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(f"{place} must have strings or integers as keys, got {key!r}")
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_pack(f"{place}.{k}", item, tensors) for k, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place} must be a number, string, list, dict, None or tensor, got {type(value).__name__}")


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _read(path: Path) -> State:
    try:
        content = json.loads((path / _ABOUT).read_bytes())
        if content.get("format") != _FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}, not {_FORMAT!r}")
        reader = dcp.FileSystemReader(path)
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in reader.read_metadata().state_dict_metadata.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        wrong = [key for key, wanted in content["checksums"].items() if checksum(tensors[key]) != wanted]
        if wrong:
            raise ValueError(f"wrong checksum of {wrong[0]}")
    except (Exception, dcp.CheckpointException) as error:  # damaged bytes make json, pickle and torch raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"checkpoint {path} is damaged ({reason}); remove its step to go on from the one before"
        ) from error
    return content, tensors


def _fit(path: Path, what: str, take: Any) -> None:
    try:
        take()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} does not fit the {what}: {' '.join(str(error).split())}") from error


def _average(paths: list[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mean of saved models, summed in float64 in the order of workers; the extra of worker 0."""
    content, tensors = _read(paths[0])
    first = _unpack(content["model"], tensors)
    extra = _unpack(content["extra"], tensors)
    total = {key: value.double() for key, value in first.items() if value.is_floating_point()}
    for path in paths[1:]:
        content, tensors = _read(path)
        for key, value in _unpack(content["model"], tensors).items():
            if key in total:
                total[key] += value
    mean = {key: (value / len(paths)).to(first[key].dtype) for key, value in total.items()}
    return {**first, **mean}, extra
