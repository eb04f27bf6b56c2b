"""The report of a comparison: one HTML page that needs no network, and the same pictures as PNG files beside it."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path

from qgm_ext import data, topology
from qgm_ext.experiments import report_plots, results, runfolder, tables
from qgm_ext.experiments.curves import require_matplotlib
from qgm_ext.experiments.results import TEST, Results, Score
from qgm_ext.files import write_atomically

__all__ = ["PAGE", "write"]

PAGE = "index.html"

_STYLE = """
:root { color-scheme: light; --ink: #1a202c; --soft: #4a5568; --line: #e2e8f0; --best: #ebf8ff; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem; }
p, li { color: var(--soft); max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--soft); white-space: nowrap; }
td .figure { white-space: nowrap; }
td.best { background: var(--best); } td.best .figure { font-weight: 700; }
td small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.25; }
tr.central td { color: var(--soft); border-bottom: 1px solid var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .9rem; color: var(--soft); }
img { width: 100%; height: auto; display: block; }
code { background: #f7fafc; padding: .1rem .3rem; overflow-wrap: anywhere; }
@media (max-width: 30rem) { body { padding: .6rem; font-size: 15px; } th, td { padding: .3rem .35rem; } }
"""


@dataclass(frozen=True)
class _Picture:
    name: str
    caption: str
    png: bytes


def write(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a comparison, finished or not.

    Args:
        folder: the comparison's folder.
        out: where to. (Default: ``report`` in it.)

    Returns: the page.

    Raises:
        ValueError: if there is no comparison in the folder, none of its runs is done, or a file is damaged.
        OSError: if it can't be written.
    """
    require_matplotlib()
    found = results.load(folder)
    if all(run.status == "unfinished" for run in found.runs.values()):
        raise ValueError(
            f"no run of the comparison in {folder} is done yet; continue with: {results.resume_command(folder)}"
        )
    target = folder / "report" if out is None else out
    target.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    sections = _sections(found, notes)
    for _, pictures in sections:
        for picture in pictures:
            _write(target / f"{picture.name}.png", picture.png)
    _write(target / PAGE, _page(found, sections, notes).encode())
    return target / PAGE


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def _sections(found: Results, notes: list[str]) -> list[tuple[str, list[_Picture]]]:
    """Headings and their pictures."""
    places: dict[tuple[str, str], dict[float | None, list[Score]]] = {}
    for score in found.scores():
        model, place, alpha = score.cell.place
        places.setdefault((model, place), {}).setdefault(alpha, []).append(score)
    test, accuracy = TEST[found.plan.metric], report_plots.accuracy_label(found.plan)
    kinds = (
        ("Learning curves", "curves", test, accuracy, "epoch", "epoch"),
        ("Consensus distance", "consensus", "consensus_distance", "consensus distance", "epoch", "epoch"),
        ("Accuracy against bytes sent", "bytes", test, accuracy, "bytes_sent", "bytes sent by all workers"),
        (
            "Accuracy against time",
            "time",
            test,
            accuracy,
            "seconds_training",
            "seconds of training on this machine, all workers on one, evaluations left out",
        ),
    )
    sections: list[tuple[str, list[_Picture]]] = []
    for heading, short, quantity, label, against, unit in kinds:
        pictures = []
        for (model, place), by_alpha in places.items():
            for alpha, scores in by_alpha.items():
                if not any(score.values for score in scores):
                    continue
                png = report_plots.draw_against(found, scores, quantity, label, against, unit)
                name = _file_name(short, model, place, alpha)
                pictures.append(_Picture(name, f"{model}, {_place_text(place)}{_alpha_text(alpha)}", png))
        sections.append((heading, pictures))
    pictures = []
    for (model, place), by_alpha in places.items():
        known = {alpha: scores for alpha, scores in by_alpha.items() if alpha is not None}
        if len(known) > 1:
            png = report_plots.draw_heterogeneity(found, known)
            pictures.append(_Picture(_file_name("alpha", model, place, None), f"{model}, {_place_text(place)}", png))
    if pictures:
        sections.insert(1, ("Accuracy against heterogeneity", pictures))
    sections.append(("Classes of every worker", _classes(found, notes)))
    made = {f"{name}:{workers}": topology.get(name, workers) for name, workers in found.plan.topologies}
    drawn = [
        _Picture(_file_name("topology", place), _place_text(place), report_plots.draw_topology(graph))
        for place, graph in made.items()
    ]
    sections.append(("Topologies", drawn))
    return [(heading, pictures) for heading, pictures in sections if pictures]


def _classes(found: Results, notes: list[str]) -> list[_Picture]:
    """The split of the first seed for each number of workers and alpha; it is the same for all methods."""
    pictures: dict[str, _Picture] = {}
    for run in found.runs.values():
        stored = run.folder / runfolder.PARTITION
        name = _file_name("classes", f"{run.cell.workers}", run.cell.alpha)
        if run.seed != found.plan.seeds[0] or name in pictures or not stored.exists():
            continue
        config = run.config
        try:
            dataset = data.load(config.data, config.data_root, num_train=config.num_train, seed=config.seed)
        except (FileNotFoundError, ImportError) as error:
            notes.append(f"The classes of every worker are not drawn, for the labels are not at hand: {error}")
            return []
        counts = data.Partition.load(stored).histogram(dataset.train_y, dataset.num_classes)
        caption = f"{run.cell.workers} workers{_alpha_text(run.cell.alpha)}, seed {run.seed}"
        pictures[name] = _Picture(name, caption, report_plots.draw_classes(counts))
    return list(pictures.values())


def _page(found: Results, sections: list[tuple[str, list[_Picture]]], notes: list[str]) -> str:
    plan = found.plan
    title = html.escape(plan.title or "Comparison")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    parts += [f"<p>{html.escape(part)}</p>" for part in (plan.description.strip(), *plan.notes(), *notes) if part]
    if not all(score.complete for score in found.scores()):
        done, needed = len(found.done()), found.num_wanted()
        parts.append(f"<p><strong>Not complete: {done} runs are done, {needed} are needed.</strong></p>")
    parts.append("<h2>Test accuracy</h2>")
    parts += [_table(table) for table in tables.make(found)]
    parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in tables.legend(found)) + "</ul>")
    for heading, pictures in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        if heading == "Learning curves":
            parts.append("<p>Mean over seeds of the chosen step size; the band is one standard deviation.</p>")
        parts.append('<div class="pictures">')
        for picture in pictures:
            inlined = base64.b64encode(picture.png).decode()
            alt = html.escape(f"{heading}: {picture.caption}")
            parts.append(
                f'<figure><img alt="{alt}" src="data:image/png;base64,{inlined}">'
                f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
            )
        parts.append("</div>")
    parts.append("<h2>What was run</h2>")
    settings = {**plan.train, **plan.hyper, "seeds": ", ".join(map(str, plan.seeds))}
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    parts.append(f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div>')
    grids = "".join(
        f"<tr><td>{html.escape(m.label)}</td><td>{html.escape(m.algorithm)}</td>"
        f"<td>{', '.join(f'{lr:g}' for lr in m.lrs)}</td></tr>"
        for m in plan.methods
    )
    parts.append(
        '<div class="scroll"><table class="settings"><thead><tr><th>method</th><th>algorithm</th><th>step sizes</th>'
        f"</tr></thead><tbody>{grids}</tbody></table></div>"
    )
    parts.append(
        f"<p>Every run with its config, partition and seed is in <code>{results.CSV}</code> and the folders "
        "that it names.</p></body></html>"
    )
    return "\n".join(parts) + "\n"


def _table(table: tables.Table) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in table.heads)
    rows = []
    for row in table.rows:
        cells = "".join(
            f"<td{' class=best' if entry.best else ''}><span class=figure>{html.escape(entry.text)}</span>"
            + (f"<small>{html.escape(entry.detail)}</small>" if entry.detail else "")
            + (f"<small>published: {html.escape(entry.published)}</small>" if entry.published else "")
            + "</td>"
            for entry in row.cells
        )
        kind = " class=central" if row.central else ""
        rows.append(f"<tr{kind}><td>{html.escape(row.label)}</td>{cells}</tr>")
    return (
        f"<h3>{html.escape(table.title)}</h3>"
        f'<div class="scroll"><table class="scores"><thead><tr><th>method</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _file_name(*words: object) -> str:
    plain = "-".join(f"{word:g}" if isinstance(word, float) else str(word) for word in words if word is not None)
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in plain)


def _place_text(place: str) -> str:
    name, workers = place.split(":")
    return f"{name} of {workers}"


def _alpha_text(alpha: float | None) -> str:
    return "" if alpha is None else f", alpha {alpha:g}"
