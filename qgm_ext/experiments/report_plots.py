"""The pictures of a report, each drawn from the results of a comparison into one small figure. Needs matplotlib.

Every figure is one panel, so that it can be read at the width of a phone; the page is that of
:mod:`qgm_ext.experiments.report`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgm_ext import topology
from qgm_ext.experiments import comparison
from qgm_ext.experiments.curves import require_matplotlib
from qgm_ext.experiments.results import TEST, Results, Run, Score

__all__ = ["accuracy_label", "draw_against", "draw_classes", "draw_heterogeneity", "draw_topology"]

_COLOURS = [
    "#2b6cb0",
    "#c05621",
    "#2f855a",
    "#805ad5",
    "#b83280",
    "#0f766e",
    "#a16207",
    "#dc2626",
    "#4338ca",
    "#65a30d",
]
_MARKERS = "osD^vP*X<>"
_CENTRAL = "#4a5568"
_SIZE = (6.0, 4.3)


def accuracy_label(plan: comparison.Comparison) -> str:
    """The words on an axis of accuracies."""
    return {"mean": "test accuracy, %", "worst": "test accuracy of the worst worker, %"}[plan.metric]


def draw_against(
    results: Results, scores: Sequence[Score], quantity: str, label: str, against: str, unit: str
) -> bytes:
    """Draw a quantity of the chosen runs over another one, as the mean over seeds with a band of one deviation.

    Args:
        results: the comparison's.
        scores: the cells of one place, one for each method.
        quantity, label: what is drawn upwards: a key of the metrics, and its words. Accuracies are drawn in percent.
        against, unit: what is drawn to the right, likewise.

    Returns: a PNG.
    """
    figure, axes = _figure()
    is_accuracy = quantity in TEST.values()
    scale = 100.0 if is_accuracy else 1.0
    for score in scores:
        runs = [run for run in results.final(score.cell) if run.status == "finished"]
        if not runs:
            continue
        x, y = _columns(runs, against), scale * _columns(runs, quantity)
        style = _style(results, score)
        axes.plot(x.mean(0), y.mean(0), label=score.cell.method.label, **style)
        if len(runs) > 1:
            spread = y.std(0, ddof=1)
            axes.fill_between(
                x.mean(0), y.mean(0) - spread, y.mean(0) + spread, color=style["color"], alpha=0.15, linewidth=0
            )
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    if not is_accuracy:
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)
    if against == "bytes_sent":
        axes.set_xscale("symlog", linthresh=1e6)
        axes.set_xlim(left=0)
    return _finish(figure, axes)


def draw_heterogeneity(results: Results, by_alpha: Mapping[float, Sequence[Score]]) -> bytes:
    """Draw accuracy over alpha, on a logarithmic axis that runs from homogeneous to heterogeneous; a PNG."""
    figure, axes = _figure()
    for method in results.plan.methods:
        points = [
            (alpha, score)
            for alpha, scores in by_alpha.items()
            for score in scores
            if score.cell.method.label == method.label and score.values
        ]
        if points:
            points.sort(key=lambda point: point[0])
            spread = [0.0 if np.isnan(score.std) else 100 * score.std for _, score in points]
            axes.errorbar(
                [alpha for alpha, _ in points],
                [100 * score.mean for _, score in points],
                spread,
                capsize=3,
                label=method.label,
                **_style(results, points[0][1]),
            )
    axes.set_xscale("log")
    axes.set_xticks(sorted(by_alpha), [f"{alpha:g}" for alpha in sorted(by_alpha)])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_xlabel("alpha of the Dirichlet partition (more heterogeneous to the right)")
    axes.set_ylabel(accuracy_label(results.plan))
    return _finish(figure, axes)


def draw_classes(counts: NDArray[np.int64]) -> bytes:
    """Draw how many samples of each class every worker holds, [workers, classes], as circles; a PNG."""
    figure, axes = _figure((6.0, 1.4 + 0.16 * max(len(counts), 10)))
    workers, classes = np.nonzero(counts)
    largest = max(int(counts.max()), 1)
    sizes = 140.0 * counts[workers, classes] / largest
    axes.scatter(classes, workers, s=sizes, color=_COLOURS[0], alpha=0.8, linewidth=0)
    axes.set_xticks(range(counts.shape[1]))
    axes.set_xlabel(f"class (largest circle: {largest} samples)")
    axes.set_ylabel("worker")
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.2)
    return _png(figure)


def draw_topology(made: topology.Topology) -> bytes:
    """Draw the graph with its spectral gap; a PNG."""
    figure, axes = _figure((6.0, 6.2))
    made.plot(axes)
    return _png(figure)


def _columns(runs: Sequence[Run], key: str) -> NDArray[np.float64]:
    """One row of a metric for each run, with NaN for null: [runs, records]."""
    return np.array([[np.nan if r[key] is None else float(r[key]) for r in run.metrics] for run in runs])


def _style(results: Results, score: Score) -> dict[str, Any]:
    """The same colour and marker for a method in every picture."""
    method = score.cell.method
    if comparison.is_centralised(method.algorithm):
        return {"color": _CENTRAL, "linestyle": "--", "marker": None, "linewidth": 1.6}
    labels = [m.label for m in results.plan.methods if not comparison.is_centralised(m.algorithm)]
    number = labels.index(method.label)
    marker, colour = _MARKERS[number % len(_MARKERS)], _COLOURS[number % len(_COLOURS)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6}


def _figure(size: tuple[float, float] = _SIZE) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure  # not pyplot: it would keep the figure and might want a display

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any) -> bytes:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
