"""TensorBoard events of a run. Needs the package tensorboard.

Events are rewritten from the records whenever a run is started or resumed, so that a killed run leaves no point twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["EventWriter", "require_tensorboard"]

_PLACES = {
    "loss": "loss/training",
    "accuracy_local_mean": "accuracy/local_mean",
    "accuracy_local_min": "accuracy/local_min",
    "accuracy_local_max": "accuracy/local_max",
    "accuracy_average": "accuracy/average",
    "accuracy": "accuracy/own",
    "validation_accuracy_local_mean": "accuracy/validation_local_mean",
    "validation_accuracy_local_min": "accuracy/validation_local_min",
    "validation_accuracy_average": "accuracy/validation_average",
    "validation_loss_local_mean": "loss/validation",
    "consensus_distance": "consensus_distance",
    "lr": "lr",
    "bytes_sent": "bytes_sent",
    "seconds": "seconds",
}


def require_tensorboard() -> None:
    """Raise ModuleNotFoundError, naming the extra that brings it, if tensorboard is missing."""
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--tensorboard needs tensorboard: pip install 'qgm_ext[train]'") from error


class EventWriter:
    """Writes records as scalars.

    Args:
        folder: where the events go; older event files in it are replaced.
        records: what has been recorded so far.
    """

    def __init__(self, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        make: Any = SummaryWriter  # untyped in some releases of torch
        self._writer = make(str(folder))
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record, visible to TensorBoard at once."""
        for key, place in _PLACES.items():
            if record.get(key) is not None:
                self._writer.add_scalar(place, record[key], record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
