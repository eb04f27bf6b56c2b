"""The comparison of the WAN test bed: which links, and the Markdown table of the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_bed import Bed, Network
from wan_methods import METHODS

from qgm_ext.experiments import plan
from qgm_ext.experiments.plan import ALL_REDUCE

__all__ = [
    "OVERVIEW",
    "TABLE",
    "cases",
    "compare",
    "estimate",
    "markdown",
    "overview",
    "predictions",
    "put_between_marks",
]

#: Marks in a file, behind which a table goes.
TABLE, OVERVIEW = "<!-- wan table -->", "<!-- wan overview -->"
_END = "<!-- end -->"
_BASELINE = "ddp"
# What `qgm plan` calls the methods that it predicts.
_PLANNED = {
    "ddp": (ALL_REDUCE, "float32"),
    "ring": ("ring", "float32"),
    "one_peer": ("one_peer_exponential", "float32"),
    "one_peer_bf16": ("one_peer_exponential", "bfloat16"),
    "one_peer_int8": ("one_peer_exponential", "int8"),
    "bare_ring": ("ring", "float32"),
    "bare_one_peer": ("one_peer_exponential", "float32"),
    "bare_one_peer_bf16": ("one_peer_exponential", "bfloat16"),
}

_GRADIENT, _START_HOST = 0.02, 5.0  # seconds of a gradient, and that it takes to start a host, on two cores
_FEWEST = 19  # steps of a method: 9 to find out how long one takes, and 10 or as many as fit

Result = dict[str, Any]


def cases(hosts: Sequence[int], short: bool) -> list[Network]:
    """The links: 1 Gbit/s and 100 Mbit/s, 1 ms and 50 ms, and one host's link ten times slower."""
    if short:
        return [Network(n, 100e6, 0.001) for n in hosts]
    return [
        network
        for n in hosts
        for network in (
            *(Network(n, rate, delay) for rate in (1e9, 100e6) for delay in (0.001, 0.05)),
            Network(n, 100e6, 0.001, slow_host=n - 1),
        )
    ]


def estimate(networks: Sequence[Network], methods: Sequence[str], seconds: float, parameters: int) -> float:
    """About how many seconds :func:`compare` takes for all networks, by the step times that ``qgm plan`` predicts."""
    total = 0.0
    for network in networks:
        slowest = min(network.rate_of(host) for host in range(network.hosts))
        planned = plan.make(parameters, plan.Network(network.hosts, slowest, network.delay, _GRADIENT)).choices
        steps = {(choice.topology, choice.message): choice.seconds for choice in planned}
        total += _START_HOST * network.hosts
        for method in methods:
            step = steps[_PLANNED.get(method, _PLANNED[_BASELINE])]
            total += _FEWEST * step + max(0.0, seconds - 10 * step)
    return total


def compare(
    network: Network, methods: Sequence[str], seconds: float, width: int, depth: int = 2, batch: int = 8
) -> list[Result]:
    """Run the methods over one network.

    Args:
        methods: names of METHODS.
        seconds: of training, of each.
        width, depth: of the model's hidden layers, and how many there are.
        batch: samples of a worker and step.

    Returns:
        For each method what the workers found, and the network.
    """
    worker = [sys.executable, str(Path(__file__).with_name("wan_worker.py")), "--seconds", str(seconds)]
    worker += ["--width", str(width), "--depth", str(depth), "--batch", str(batch), "--hosts", str(network.hosts)]
    worker += ["--methods", *methods]
    with Bed(network) as bed:
        limit = 120 + len(methods) * (60 + 4 * seconds)
        outputs = bed.run(lambda host: [*worker, "--rank", str(host)], limit)
        delay_by = bed.delay_by
    link = f"{network.rate / 1e6:g} Mbit/s, {network.delay * 1e3:g} ms"
    if network.slow_host is not None:
        link += ", one host a tenth"
    about = {"hosts": network.hosts, "link": link, "delay_by": delay_by, "budget": seconds}
    slowest = min(network.rate_of(host) for host in range(network.hosts))
    about |= {"slowest_rate": slowest, "delay": network.delay}
    return [{**about, **result} for result in json.loads(outputs[0])]


def markdown(results: Sequence[Result]) -> str:
    """The table, with the speed of each method relative to all-reduce over the same network."""
    base = {(r["hosts"], r["link"]): r["seconds"] for r in results if r["method"] == _BASELINE}
    lines = [
        "| hosts | link of each host, delay | method | ms a step | steps a second, over DDP | MB a step and host | "
        "accuracy (steps) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        reference = base.get((r["hosts"], r["link"]))
        factor = f"{reference / r['seconds']:.2f}" if reference else ""
        lines.append(
            f"| {r['hosts']} | {r['link']} | {METHODS[r['method']][0]} | {r['seconds'] * 1e3:.0f} | {factor} | "
            f"{r['bytes_mean'] / 1e6:.2f} | {r['accuracy']:.1%} ({r['steps']}) |"
        )
    return "\n".join([*lines, "", _setting(results)])


def overview(results: Sequence[Result]) -> str:
    """One row for each network: steps a second of each method, over those of all-reduce; accuracy after equal time."""
    networks = list(dict.fromkeys((r["hosts"], r["link"]) for r in results))
    methods = list(dict.fromkeys(r["method"] for r in results if r["method"] != _BASELINE))
    found = {(r["hosts"], r["link"], r["method"]): r for r in results}
    names = [METHODS[method][0] for method in (_BASELINE, *methods)]
    lines = [f"| hosts | link of each host, delay | {' | '.join(names)} |", f"|{'---|' * (2 + len(names))}"]
    for network in networks:
        base = found[(*network, _BASELINE)]
        cells = [f"{base['seconds'] * 1e3:.0f} ms, {base['accuracy']:.0%}"]
        for method in methods:
            r = found.get((*network, method))
            cells.append(f"{base['seconds'] / r['seconds']:.2f} x, {r['accuracy']:.0%}" if r else "-")
        lines.append(f"| {network[0]} | {network[1]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _setting(results)])


def _setting(results: Sequence[Result]) -> str:
    ways = sorted({r["delay_by"] for r in results})
    sizes = sorted({r["parameters"] for r in results})
    return (
        f"Delay (one way) by {', '.join(ways)}; model of {', '.join(f'{size:,}' for size in sizes)} parameters; "
        f"accuracy of the local models, mean, after {results[0]['budget']:g} s of training each, but at least "
        f"{_FEWEST} steps."
    )


def predictions(results: Sequence[Result]) -> list[tuple[Result, float]]:
    """What ``qgm plan`` predicts for the results that it has a model of, in seconds a step.

    The time of a gradient is taken from a gossip method over the same network: DDP's backward waits for messages.
    """
    gradient = {
        (r["hosts"], r["link"]): r["backward_seconds"] for r in results if r["method"] not in ("ddp", "ddp_bf16")
    }
    found = []
    for r in results:
        place = (r["hosts"], r["link"])
        if r["method"] not in _PLANNED or place not in gradient:
            continue
        network = plan.Network(r["hosts"], r["slowest_rate"], r["delay"], gradient[place])
        choices = {(c.topology, c.message): c.seconds for c in plan.make(r["parameters"], network).choices}
        found.append((r, choices[_PLANNED[r["method"]]]))
    return found


def put_between_marks(path: Path, mark: str, table: str) -> None:
    """Replace what stands between a mark (TABLE or OVERVIEW) and its end in a file.

    Raises:
        ValueError: if the file lacks them.
    """
    before, begin, rest = path.read_text().partition(mark)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{path} lacks {mark} or {_END} after it")
    path.write_text(f"{before}{mark}\n{table}\n{_END}{after}")
