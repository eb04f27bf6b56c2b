"""Timelines of real processes: every bucket of every step is in them, and overlap shows in the order of events."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from process_pool import ProcessPool
from qgm_ext import topology
from qgm_ext.distributed import trace
from qgm_ext.distributed.exchange import Stamp
from qgm_ext.distributed.timeline import span, trace_steps
from qgm_ext.optim import Decentralized

N, STEPS, BUCKETS = 3, 2, 4  # a ring of three: two neighbours each
Event = dict[str, Any]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(N) as made:
        yield made


def train(rank: int, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    for name, arguments in cases.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))
        arguments = {"algorithm": "qg_dsgdm_n", "bucket_mb": 1e-3, **arguments}  # buckets of 256 numbers
        opt = Decentralized(model.parameters(), topology=topology.ring(N), lr=0.1, **arguments)
        x = torch.ones(4, 8) * (rank + 1)

        def step(model: nn.Module = model, opt: Decentralized = opt, x: torch.Tensor = x) -> None:
            opt.zero_grad()
            loss = model(x).square().mean()
            with record_function("backward"):
                loss.backward()
            opt.step()

        step()
        with trace(Path(folder, f"{name}.json")):
            for _ in range(STEPS):
                step()
        step()


CASES: dict[str, dict[str, Any]] = {
    "together": {},
    "overlap": {"overlap": True},
    "healing": {"on_peer_loss": "heal"},
    "rounded": {"message": "int8"},
    "mean": {"algorithm": "csgdm"},
}


@pytest.fixture(scope="module")
def traces(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Event]]:
    folder = tmp_path_factory.mktemp("traces")
    pool.run(train, N, str(folder), CASES)
    return {name: json.loads((folder / f"{name}.json").read_text())["traceEvents"] for name in CASES}


def spans(events: list[Event], worker: int, start: str) -> list[Event]:
    found = [e for e in events if e["ph"] == "X" and e["pid"] == worker and e["name"].startswith(start)]
    return sorted(found, key=lambda e: e["ts"])


@pytest.mark.parametrize("name", CASES)
def test_events_are_those_of_the_format(traces: dict[str, list[Event]], name: str) -> None:
    events = traces[name]
    named = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert named == {worker: f"worker {worker}" for worker in range(N)}
    threads = defaultdict(list)
    open_messages = Counter()
    for e in events:
        assert e["pid"] in named, e
        assert isinstance(e["name"], str), e
        assert e["ts"] >= 0, e
        if e["ph"] == "X":
            assert e["dur"] >= 0, e
            threads[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
        elif e["ph"] in "be":
            open_messages[e["pid"], e["cat"], e["name"], e["id"]] += 1 if e["ph"] == "b" else -1
    assert len(open_messages) > 0
    assert set(open_messages.values()) == {0}
    for found in threads.values():  # what is in one row must nest
        inside: list[float] = []
        for begin, end in sorted(found, key=lambda times: (times[0], -times[1])):
            while inside and inside[-1] <= begin + 0.01:
                inside.pop()
            assert not inside or end <= inside[-1] + 0.01, (begin, end, inside)
            inside.append(end)


@pytest.mark.parametrize("name", ["together", "overlap", "rounded", "healing"])
def test_every_bucket_of_every_step_is_there(traces: dict[str, list[Event]], name: str) -> None:
    for worker in range(N):
        steps = spans(traces[name], worker, "Optimizer.step#")
        assert len(steps) == STEPS
        sent = Counter(e["name"] for e in spans(traces[name], worker, "qgm_ext: send"))
        buckets = sorted(sent)
        assert buckets == [f"qgm_ext: send bucket {k}" for k in range(len(buckets))]
        assert len(buckets) >= BUCKETS
        assert set(sent.values()) == {STEPS}
        for op in ("qgm_ext::local_step_", "qgm_ext::merge_"):
            assert len(spans(traces[name], worker, op)) == STEPS * len(buckets)
        waits = Counter(e["name"] for e in spans(traces[name], worker, "qgm_ext: wait"))
        if name == "healing":
            assert waits == {"qgm_ext: wait from bucket 0": STEPS}
        else:
            peers = [peer for peer in range(N) if peer != worker]
            wanted = [f"qgm_ext: wait for {peer} bucket {k}" for peer in peers for k in range(len(buckets))]
            assert waits == dict.fromkeys(wanted, STEPS)
        for kind in ("gloo:send", "gloo:recv"):
            begun = [e for e in traces[name] if e["ph"] == "b" and e["pid"] == worker and e["name"] == kind]
            assert len(begun) == 2 * STEPS * len(buckets)


def test_an_exact_mean_sends_twice(traces: dict[str, list[Event]]) -> None:
    sent = Counter(e["name"] for e in spans(traces["mean"], 0, "qgm_ext: send"))
    assert len(sent) >= 2 * BUCKETS
    assert set(sent.values()) == {STEPS}


@pytest.mark.parametrize("overlap", [True, False])
def test_overlap_shows_in_the_order_of_events(traces: dict[str, list[Event]], overlap: bool) -> None:
    events = traces["overlap" if overlap else "together"]
    for worker in range(N):
        backwards, sends = spans(events, worker, "backward"), spans(events, worker, "qgm_ext: send")
        steps = spans(events, worker, "Optimizer.step#")
        count = len(sends) // STEPS
        for k, (backward, step) in enumerate(zip(backwards, steps, strict=True)):
            end = backward["ts"] + backward["dur"]
            assert end <= step["ts"]
            for send in sends[k * count : (k + 1) * count]:
                if overlap:
                    assert backward["ts"] <= send["ts"] < end
                else:
                    assert step["ts"] <= send["ts"]


def leave_by_error(rank: int, folder: str) -> str:
    try:
        with trace(Path(folder, "never.json")):
            raise KeyError("of the user")
    except KeyError as error:
        said = str(error)
    with trace_steps(Path(folder, "steps.json"), 2) as after_step:
        for step in range(6):
            with record_function(f"step {step}"):
                pass
            after_step()
    return said


def test_an_error_goes_through_and_steps_are_counted(pool: ProcessPool, tmp_path: Path) -> None:
    assert pool.run(leave_by_error, 2, str(tmp_path)) == ["'of the user'"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["steps.json"]
    events = json.loads((tmp_path / "steps.json").read_text())["traceEvents"]
    for worker in range(2):
        assert [e["name"] for e in spans(events, worker, "step")] == ["step 2", "step 3"]


def test_a_span_is_nothing_while_nobody_records() -> None:
    assert span("send", Stamp(0, 0, 0)) is span("wait for", Stamp(5, 1, 2), 3)
    with torch.profiler.profile() as recorded, span("wait for", Stamp(5, 1, 2), 3):
        pass
    assert [event.name for event in recorded.events()] == ["qgm_ext: wait for 3 bucket 2 pass 1"]
