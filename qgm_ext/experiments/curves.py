"""The learning curves of a run as a PNG. Needs matplotlib, draws without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

__all__ = ["require_matplotlib", "save_learning_curves"]

_BLUE, _ORANGE, _GREEN, _GREY = "#2b6cb0", "#c05621", "#2f855a", "#718096"


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, naming the extra that brings it, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("learning curves need matplotlib: pip install 'qgm_ext[train]'") from error


def save_learning_curves(file: IO[bytes], metrics: Sequence[Mapping[str, Any]], title: str, chance: float) -> None:
    """Draw accuracy, loss and consensus distance over epochs.

    Args:
        file: where the PNG is written.
        metrics: the records of metrics.jsonl.
        title: what was trained.
        chance: accuracy of guessing, in [0, 1].
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # not pyplot: it would keep the figure and might want a display
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.0, 7.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    figure.suptitle(title, fontsize=11)

    epochs = [record["epoch"] for record in metrics]
    column = {key: [_number(record[key]) for record in metrics] for key in metrics[0]}
    marker = "o" if len(epochs) <= 40 else None
    upper.fill_between(
        epochs,
        column["accuracy_local_min"],
        column["accuracy_local_max"],
        color=_BLUE,
        alpha=0.18,
        linewidth=0,
        label="local models: worst to best worker",
    )
    upper.plot(epochs, column["accuracy_local_mean"], color=_BLUE, marker=marker, ms=3, label="local models: mean")
    upper.plot(epochs, column["accuracy_average"], color=_ORANGE, marker=marker, ms=3, label="averaged model")
    if "validation_accuracy_local_mean" in column:
        upper.plot(epochs, column["validation_accuracy_local_mean"], "--", color=_BLUE, label="mean on validation set")
    upper.axhline(chance, color=_GREY, linestyle=":", linewidth=1, label="guessing")
    upper.set_ylabel("test accuracy")
    upper.set_ylim(0, 1)
    upper.yaxis.set_major_formatter(PercentFormatter(1.0))
    upper.legend(loc="lower right", framealpha=0.9, edgecolor="none")

    known = [(epoch, loss) for epoch, loss in zip(epochs, column["loss"], strict=True) if loss == loss]
    if known:
        lower.plot(*zip(*known, strict=True), color=_GREEN, marker=marker, ms=3, label="training loss")
    lower.set_ylabel("training loss", color=_GREEN)
    lower.set_xlabel("epoch")
    lower.set_xlim(epochs[0], max(epochs[-1], epochs[0] + 1e-9))
    lower.set_ylim(bottom=0)
    distance = lower.twinx()
    distance.plot(epochs, column["consensus_distance"], color=_GREY, linestyle="--", label="consensus distance")
    distance.set_ylabel("consensus distance", color=_GREY)
    distance.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    distance.spines["top"].set_visible(False)
    figure.savefig(file, format="png", dpi=130)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
