"""The table as in the paper, from the results of a comparison: methods x alphas for each model and topology.

One text form for the terminal, the report and the README, so that all three say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qgm_ext.experiments import comparison
from qgm_ext.experiments.results import Results, Score

__all__ = ["Entry", "Row", "Table", "legend", "make", "markdown", "score_text"]


@dataclass(frozen=True)
class Entry:
    """One cell: ``text`` is the figure, ``detail`` what else is to be known, ``published`` the papers' figure."""

    text: str
    detail: str = ""
    published: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One method; ``central``: it averages exactly, and stands on top."""

    label: str
    cells: tuple[Entry, ...]
    central: bool = False


@dataclass(frozen=True)
class Table:
    """Methods x alphas on one model and topology; centralised methods stand on top."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


def score_text(score: Score) -> str:
    """Mean and standard deviation in percent.

    "diverged" where no seed has a result, "-" where none is done.
    """
    if not score.values:
        return "diverged" if score.diverged and score.complete else "-"
    if math.isnan(score.std):
        return f"{100 * score.mean:.1f}"
    return f"{100 * score.mean:.1f} ± {100 * score.std:.1f}"


def make(results: Results) -> list[Table]:
    """One table for each model and topology of the comparison."""
    plan = results.plan
    tables: list[Table] = []
    by_place: dict[tuple[str, str], list[Score]] = {}
    for score in results.scores():
        model, place, _ = score.cell.place
        by_place.setdefault((model, place), []).append(score)
    for (model, place), scores in by_place.items():
        alphas = list(dict.fromkeys(score.cell.alpha for score in scores))
        best = {alpha: _best([score for score in scores if score.cell.alpha == alpha]) for alpha in alphas}
        methods = sorted(plan.methods, key=lambda method: not comparison.is_centralised(method.algorithm))
        rows = []
        for method in methods:
            own = {score.cell.alpha: score for score in scores if score.cell.method.label == method.label}
            entries = tuple(_entry(own[alpha], own[alpha] is best[alpha]) for alpha in alphas)
            rows.append(Row(method.label, entries, comparison.is_centralised(method.algorithm)))
        rows += _only_published(results, model, place, alphas)
        heads = tuple(str(plan.train.get("partition")) if alpha is None else f"alpha = {alpha:g}" for alpha in alphas)
        name, workers = place.split(":")
        tables.append(Table(f"{model} on {plan.train.get('data', 'digits')}, {name} of {workers}", heads, tuple(rows)))
    return tables


def legend(results: Results) -> list[str]:
    """What the figures of the table are."""
    plan = results.plan
    chosen = "the first seed" if plan.lr_seeds == "first" else "all seeds"
    when = "at the end of the run" if plan.choose == "last" else "at the best validation accuracy"
    whose = {"mean": "mean of the local models", "worst": "of the worst local model"}[plan.metric]
    n = len(plan.seeds)
    lines = [
        f"Test accuracy in %, {whose} {when}; mean ± standard deviation over {n} seed{'s' if n > 1 else ''}.",
        f"lr: chosen on validation accuracy with {chosen}, never on the test set; * marks an edge of the grid.",
    ]
    if n > 1:
        lines.append(
            f"Difference to {plan.baseline} in points, with the p value of a paired t test over the seeds; n = {n} is "
            "small, so only large effects come out clear."
        )
    sources = dict.fromkeys(figure.source for figure in plan.published if figure.source)
    if sources:
        lines.append(f"Published figures: {'; '.join(sources)}.")
    if any(not figure.verified for figure in plan.published):
        lines.append("Published figures marked 'not verified' could not be compared with their source.")
    return lines


def markdown(table: Table, with_published: bool) -> str:
    """The table in Markdown; published figures stand in columns of their own."""
    heads = ["method"]
    for head in table.heads:
        heads += [head, f"{head}: lr, difference"] + ([f"{head}: published"] if with_published else [])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table.rows:
        cells = [row.label]
        for entry in row.cells:
            cells += [f"**{entry.text}**" if entry.best else entry.text, entry.detail]
            cells += [entry.published] if with_published else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(scores: list[Score]) -> Score | None:
    """The best decentralised one; a single contender is nothing to mark."""
    rivals = [s for s in scores if s.values and not comparison.is_centralised(s.cell.method.algorithm)]
    return max(rivals, key=lambda score: score.mean) if len(rivals) > 1 else None


def _entry(score: Score, best: bool) -> Entry:
    parts = []
    if score.lr is not None:
        parts.append(f"lr {score.lr:g}{'*' if score.at_edge else ''}")
    if score.against is not None:
        p = "" if math.isnan(score.against.p) else f" (p = {score.against.p:.2g})"
        parts.append(f"{100 * score.against.difference:+.1f}{p}")
    if score.values and score.diverged:
        parts.append(f"{score.diverged} of {score.diverged + len(score.values)} seeds diverged")
    if not score.complete:
        parts.append("not complete")
    published = "; ".join(_published_text(figure) for figure in score.published)
    return Entry(score_text(score), ", ".join(parts), published, best)


def _published_text(figure: comparison.Published) -> str:
    std = "" if figure.std is None else f" ± {figure.std:g}"
    marks = [mark for mark in ("" if figure.verified else "not verified", figure.note) if mark]
    return f"{figure.value:g}{std}" + (f" ({', '.join(marks)})" if marks else "")


def _only_published(results: Results, model: str, place: str, alphas: list[float | None]) -> list[Row]:
    """Rows of methods that only papers have figures of."""
    own = {method.label for method in results.plan.methods}
    figures = [
        figure
        for figure in results.plan.published
        if figure.method not in own and figure.topology == place and figure.model in (None, model)
    ]
    rows = []
    for label in dict.fromkeys(figure.method for figure in figures):
        cells = []
        for alpha in alphas:
            here = [f for f in figures if f.method == label and f.alpha in (None, alpha)]
            cells.append(Entry("", published="; ".join(map(_published_text, here))))
        rows.append(Row(label, tuple(cells)))
    return rows
