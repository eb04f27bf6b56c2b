"""RunFolder: the files of one run, written so that a kill -9 or a power cut at any moment loses no more than a moment.

Every file is written beside its place, flushed to the disk and renamed, so that a reader finds the old one or the new
one and never half of one. The exception is metrics.jsonl, which grows line by line; its truth is in the checkpoint.
A lock on the folder keeps a second run out. What the files mean is the business of :mod:`qgm_ext.experiments.train`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from qgm_ext.files import naming, write_atomically

__all__ = [
    "CHECKPOINT",
    "CHECKPOINTS",
    "CONFIG",
    "CURVES",
    "DIVERGED",
    "METRICS",
    "PARTITION",
    "SUMMARY",
    "RunFolder",
    "check_empty",
    "json_text",
    "lock_folder",
]

CONFIG = "config.json"
PARTITION = "partition.npz"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
DIVERGED = "diverged.json"  # in place of a summary, where a comparison takes divergence for a result
CURVES = "learning_curves.png"
CHECKPOINT = "checkpoint.pt"
_LOCK = ".lock"
CHECKPOINTS = "checkpoints"  # of workers in processes of their own
_OF_WORKERS = re.compile(rf"{CHECKPOINTS}|worker-\d+-of-\d+")

Record = Mapping[str, Any]


class RunFolder:
    """The folder of one run, locked until :meth:`close`. Made by :meth:`create` or :meth:`open`; a context manager.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._metrics: IO[bytes] | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], beside_workers: bool = False) -> RunFolder:
        """Take a folder for a new run; it is made if need be.

        Args:
            path: of the folder.
            beside_workers: what workers in processes of their own keep (:mod:`qgm_ext.experiments.worker_files`) may be
                there, as on a machine that was not the first of them before.

        Raises:
            ValueError: if it is not empty, can't be written to, or is in use.
        """
        folder = Path(path)
        check_empty(folder, beside_workers)  # before anything is written into a folder that is not ours
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder, lock_folder(folder))
        except OSError as error:
            raise ValueError(f"out folder {folder} can't be written to: {error.strerror or error}") from error
        try:
            check_empty(folder, beside_workers)  # again: another run may have come first
            run._remove_leftovers()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Take the folder of an earlier run.

        Raises:
            ValueError: if there is no run in it, it can't be written to, or is in use.
        """
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"there is no run to resume in {folder}: it holds no {CONFIG}; start one with --out")
        try:
            run = cls(folder, lock_folder(folder))
        except OSError as error:
            raise ValueError(f"run folder {folder} can't be written to: {error.strerror or error}") from error
        run._remove_leftovers()
        return run

    @classmethod
    def of_worker(cls, path: Path) -> RunFolder:
        """Take the folder, in that of a run, of a worker in a process of its own; it is made if need be.

        Raises:
            ValueError: if it can't be written to, or is in use.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, lock_folder(path, "worker"))
        except OSError as error:
            raise ValueError(f"folder {path} of a worker can't be written to: {error.strerror or error}") from error
        run._remove_leftovers()
        return run

    def file(self, name: str) -> Path:
        """The path of one of the run's files."""
        return self.path / name

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(self.file(name), lambda file: file.write(text.encode()))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file atomically; infinities and NaN become null."""
        self.write_text(name, json_text(content))

    def start_metrics(self, records: Iterable[Record]) -> None:
        """Make metrics.jsonl hold exactly these records: none in a new run, those of the checkpoint in a resumed one.

        Lines that a killed run wrote after its last checkpoint, a torn one among them, are gone then; the steps that
        they tell of are done again.
        """
        self._close_metrics()
        write_atomically(self.file(METRICS), lambda file: file.write(b"".join(map(_line, records))))
        # It stays open until close, and unbuffered: what found no space must not be written once more by close.
        self._metrics = open(self.file(METRICS), "ab", buffering=0)  # noqa: SIM115

    def append_metrics(self, record: Record) -> None:
        """Append one line to metrics.jsonl, visible to readers at once."""
        if self._metrics is None:
            raise RuntimeError("start_metrics comes before append_metrics")
        left = _line(record)
        with naming(self.file(METRICS)):
            while left:
                left = left[self._metrics.write(left) :]

    def flush_metrics(self) -> None:
        """Flush metrics.jsonl to the disk: a checkpoint is written after the metrics that it knows of."""
        if self._metrics is not None:
            with naming(self.file(METRICS)):
                os.fsync(self._metrics.fileno())

    def save_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Write checkpoint.pt atomically, after the metrics that it knows of.

        Args:
            content: tensors, numbers, strings and containers of them: what torch.load(weights_only=True) can read.
        """
        self.flush_metrics()
        write_atomically(self.file(CHECKPOINT), lambda file: _save(dict(content), file))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """What :meth:`save_checkpoint` wrote last, with tensors on the CPU; None before the first.

        Raises:
            ValueError: if the file is damaged; names it.
        """
        path = self.file(CHECKPOINT)
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of the tensors
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"wrong checksum of {broken}")
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make zipfile, pickle and torch raise nearly anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged ({reason}); the run can't be resumed from it") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no checkpoint of qgm train: it holds a {type(content).__name__}")
        return content

    def close(self) -> None:
        """Close the files and give up the lock."""
        self._close_metrics()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _remove_leftovers(self) -> None:
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Remembering:
    """A file that keeps the error of a write: torch.save makes a RuntimeError without the reason of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    """torch.save, but an OSError where the file can't be written, e.g. because the disk is full."""
    remembering = _Remembering(file)
    try:
        torch.save(content, remembering)  # type: ignore[arg-type]
    except RuntimeError as error:
        if remembering.error is None:
            raise
        raise remembering.error from error


def json_text(content: Mapping[str, Any]) -> str:
    """The text of a JSON file; infinities and NaN become null."""
    return json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n"


def _line(record: Record) -> bytes:
    return (json.dumps(_jsonable(record), allow_nan=False) + "\n").encode()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_empty(folder: Path, beside_workers: bool = False) -> None:
    """Raise ValueError if a folder holds anything but what is left by a run that was killed before its first file, or,
    ``beside_workers``, by workers of a run of which nothing else is there.
    """
    if not os.path.lexists(folder):
        return
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ValueError(f"out folder {folder} can't be used: {error.strerror or error}") from error
    foreign = [name for name in names if name != _LOCK and not (name.startswith(".") and name.endswith(".tmp"))]
    if beside_workers and CONFIG not in foreign:
        foreign = [name for name in foreign if _OF_WORKERS.fullmatch(name) is None]
    if foreign:
        hint = f"; --resume {shlex.quote(str(folder))} continues the run in it" if CONFIG in foreign else ""
        raise ValueError(f"out folder {folder} is not empty, it holds {foreign[0]}{hint}")


def lock_folder(folder: Path, what: str = "run") -> int:
    """Lock the folder for one ``what`` and return the open lock file; its end, or the process's, gives the lock up.

    Raises:
        ValueError: if it is in use.
    """
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        owner = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise ValueError(
            f"folder {folder} is in use by another {what}{f' (process {owner})' if owner else ''}"
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock
