"""``python benchmarks/wan``: try methods over slow, far links between hosts that are network namespaces.

See README.md beside this file. Everything runs in a sandbox (wan_sandbox.py) that the kernel removes at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import wan_sandbox
from wan_bed import Bed, Network
from wan_methods import DEFAULT, METHODS
from wan_probe import probe
from wan_table import OVERVIEW, TABLE, cases, compare, estimate, markdown, overview, predictions, put_between_marks

_SKIPPED = 77  # what automake and meson call skipped


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/wan", description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which everything is stopped")
    commands = parser.add_subparsers(dest="what", required=True)
    links = commands.add_parser("links", help="measure bandwidth and delay of the links against their nominal values")
    links.add_argument("--hosts", type=int, default=4)
    links.add_argument("--mbit", type=float, default=100.0, help="of each host's link, each way")
    links.add_argument("--delay-ms", type=float, default=1.0, help="one way between two hosts")
    links.add_argument("--slow-host", type=int, help="a host with a tenth of the bandwidth")
    table = commands.add_parser("compare", help="compare methods over several links; prints a Markdown table")
    table.add_argument("--hosts", type=int, nargs="+", default=[4, 8])
    table.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT))
    table.add_argument("--seconds", type=float, default=10.0, help="of training, of each method over each link")
    table.add_argument("--width", type=int, default=640, help="of the hidden layers of the model")
    table.add_argument("--depth", type=int, default=2, help="how many hidden layers it has")
    # Few samples a step: the hosts share this machine's cores, and the network, not they, is what is tried.
    table.add_argument("--batch", type=int, default=8, help="samples of a host and step")
    table.add_argument("--short", action="store_true", help="only 100 Mbit/s and 1 ms")
    table.add_argument("--json", help="file for the results")
    again = commands.add_parser("table", help="print or fill in the table of results again")
    again.add_argument("json", help="file that compare --json wrote")
    for command in (table, again):
        command.add_argument("--table", help=f"file that gets the table, between {TABLE} and its end")
        command.add_argument("--overview", help=f"file that gets a row for each network, after {OVERVIEW}")
    check = commands.add_parser("check", help="compare a table's results with what qgm plan predicts")
    check.add_argument("json", help="file that compare --json wrote")
    given = parser.parse_args()
    if given.what in ("check", "table"):
        results = json.loads(Path(given.json).read_text())
        return _check(results) if given.what == "check" else _table(results, given)
    if wan_sandbox.INSIDE not in os.environ:
        reason = wan_sandbox.why_not()
        if reason is not None:
            print(f"wan: skipped: {reason}", file=sys.stderr)
            return _SKIPPED
        return wan_sandbox.run_inside(
            [sys.executable, str(Path(__file__).resolve().parent), *sys.argv[1:]], given.timeout
        )
    try:
        if given.what == "links":
            _links(given)
        else:
            _compare(given)
    except ValueError as error:
        print(f"wan: {error}", file=sys.stderr)
        return 2
    return 0


def _links(given: argparse.Namespace) -> None:
    network = Network(given.hosts, given.mbit * 1e6, given.delay_ms / 1e3, given.slow_host)
    with Bed(network) as bed:
        print(f"delay by {bed.delay_by}", flush=True)
        for host in range(given.hosts):
            other = (host + 1) % given.hosts
            rate, delay = probe(bed, host, other)
            nominal = min(network.rate_of(host), network.rate_of(other))
            print(
                f"host {host} to {other}: {rate / 1e6:.1f} Mbit/s of {nominal / 1e6:g}, "
                f"{delay * 1e3:.2f} ms of {network.delay * 1e3:g}"
            )


def _compare(given: argparse.Namespace) -> None:
    results: list[dict[str, Any]] = []
    networks = cases(given.hosts, given.short)
    width = given.width
    parameters = 65 * width + (given.depth - 1) * (width + 1) * width + 10 * (width + 1)
    minutes = estimate(networks, given.methods, given.seconds, parameters) / 60
    print(
        f"{len(networks)} networks, {len(given.methods)} methods: about {minutes:.0f} min", file=sys.stderr, flush=True
    )
    for network in networks:
        results += compare(network, given.methods, given.seconds, given.width, given.depth, given.batch)
        print(markdown(results[-len(given.methods) :]), file=sys.stderr, flush=True)
        if given.json:  # after each, so that what was measured is not lost
            Path(given.json).write_text(json.dumps(results, indent=1) + "\n")
    _table(results, given)


def _table(results: list[dict[str, Any]], given: argparse.Namespace) -> int:
    """Print the table, and put it and the overview into the files that are given for them."""
    table = markdown(results)
    print(table)
    if given.table:
        put_between_marks(Path(given.table), TABLE, table)
    if given.overview:
        put_between_marks(Path(given.overview), OVERVIEW, overview(results))
    return 0


def _check(results: list[dict[str, Any]]) -> int:
    """Print predicted and measured times; 1 if one is off by more than a quarter where the network decides."""
    wrong = 0
    for result, predicted in predictions(results):
        ratio = predicted / result["seconds"]
        # On a fast link the hosts' shared cores decide, of which the plan knows only the gradient.
        decides = result["slowest_rate"] <= 100e6
        off = decides and not 0.75 <= ratio <= 1.25
        wrong += off
        print(
            f"{result['hosts']} hosts, {result['link']}, {result['method']}: predicted {predicted * 1e3:.0f} ms, "
            f"measured {result['seconds'] * 1e3:.0f} ms, ratio {ratio:.2f}{' OFF' if off else ''}"
            f"{'' if decides else ' (cores decide)'}"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
