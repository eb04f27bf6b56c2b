"""Fill the README's table of results from a comparison's results file, so that no figure in it is typed by hand.

    python benchmarks/fill_readme.py                     fill README.md from benchmarks/results
    python benchmarks/fill_readme.py --take DIR NAME     first take over the results of `qgm compare` in DIR as NAME

Each NAME stands in the README between ``<!-- results: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from qgm_ext.experiments import results, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def block(name: str) -> str:
    """What stands between the markers: command, time, tables and their legend."""
    found = results.load_csv(RESULTS / name)
    done = {run.folder: run for run in found.runs.values() if run.status != "unfinished"}
    seconds = sum(run.seconds for run in done.values())
    parts = [
        f"`qgm compare --preset {name}`: {found.plan.title}. {len(done)} of {found.num_wanted()} runs done, "
        f"{seconds / 60:.0f} minutes of training and evaluation in all, as the clock of their processes had it.",
    ]
    for table in tables.make(found):
        shown = [row for row in table.rows if any(entry.text not in ("-", "") for entry in row.cells)]
        kept = tables.Table(table.title, table.heads, tuple(shown))
        published = any(entry.published for row in shown for entry in row.cells)
        parts += [f"{table.title}:", tables.markdown(kept, with_published=published)]
        missing = [row.label for row in table.rows if row not in shown]
        if missing:
            parts.append(f"Not run yet: {', '.join(missing)}.")
    parts.append("\n".join(f"- {line}" for line in tables.legend(found)))
    return "\n\n".join(parts)


def filled(readme: str) -> str:
    """The README with every block of results as it must be."""
    return re.sub(
        r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{block(found[2])}\n{found[3]}",
        readme,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", nargs=2, metavar=("DIR", "NAME"))
    take = parser.parse_args().take
    if take is not None:
        target = RESULTS / take[1]
        target.mkdir(parents=True, exist_ok=True)
        for file in (results.COMPARISON, results.CSV):
            shutil.copy(Path(take[0]) / file, target / file)
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
