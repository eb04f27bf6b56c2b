"""Fill the README's table of results from a comparison's results file, so that no figure in it is typed by hand.

    python benchmarks/fill_readme.py                     fill README.md from benchmarks/results
    python benchmarks/fill_readme.py --take DIR NAME     first take over the results of `qgm compare` in DIR as NAME
    python benchmarks/fill_readme.py --run NAME DIR      first run `qgm compare --preset NAME` to DIR, and time it

Each NAME stands in the README between ``<!-- results: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from qgm_ext.experiments import results, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOOK = "took.json"  # beside the results of a command that ran without a break


def block(name: str) -> str:
    """What stands between the markers: command, time, tables and their legend."""
    found = results.load_csv(RESULTS / name)
    done = found.done()
    seconds = sum({run.folder: run.seconds for run in done}.values())  # cells may share a run
    took = RESULTS / name / TOOK
    whole = ""
    if took.exists():
        said = json.loads(took.read_text(encoding="utf-8"))
        whole = f" The command took {said['seconds'] / 60:.1f} minutes ({said['machine']})."
    parts = [
        f"`qgm compare --preset {name}`: {found.plan.title}. {len(done)} of {found.num_wanted()} runs done, "
        f"{seconds / 60:.0f} minutes of training and evaluation in all, as the clock of their processes had it.{whole}",
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


def take(folder: Path, name: str) -> None:
    """Take over results; how long the command took is not known any more."""
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in (results.COMPARISON, results.CSV):
        shutil.copy(folder / file, target / file)
    (target / TOOK).unlink(missing_ok=True)


def run(name: str, folder: Path) -> None:
    """Run the command and take over what it finds and how long it took."""
    import conftest  # that of the benchmarks; under pytest another one would be found

    if folder.exists():
        sys.exit(f"{folder} exists; the time of a comparison that goes on is not that of the command")
    begin = time.perf_counter()
    command = [sys.executable, "-m", "qgm_ext", "compare", "--preset", name, "--out", str(folder)]
    subprocess.run(command, check=True)
    took = {"seconds": round(time.perf_counter() - begin, 1), "machine": conftest.machine()}
    take(folder, name)
    (RESULTS / name / TOOK).write_text(json.dumps(took) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", nargs=2, metavar=("DIR", "NAME"))
    parser.add_argument("--run", nargs=2, metavar=("NAME", "DIR"))
    given = parser.parse_args()
    if given.run is not None:
        run(given.run[0], Path(given.run[1]))
    if given.take is not None:
        take(Path(given.take[0]), given.take[1])
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
