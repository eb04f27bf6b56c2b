"""The WAN test bed (benchmarks/wan): its links do what they are named for, and nothing of it is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "wan"
sys.path.insert(0, str(FOLDER))

import wan_sandbox  # noqa: E402
import wan_table  # noqa: E402
from wan_bed import Bed, Network  # noqa: E402

_reason = wan_sandbox.why_not()
needs_namespaces = pytest.mark.skipif(_reason is not None, reason=f"{_reason}")


def run_bed(*arguments, env=None):
    return subprocess.Popen(
        [sys.executable, str(FOLDER), "--timeout", "60", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def processes_with(token):
    """The processes whose environment holds the token, zombies aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return found


@needs_namespaces
def test_links_have_their_bandwidth_and_delay_and_one_is_ten_times_slower():
    bed = run_bed("links", "--hosts", "3", "--mbit", "40", "--delay-ms", "20", "--slow-host", "2")
    out, err = bed.communicate(timeout=90)
    assert bed.returncode == 0, err
    assert re.match(r"delay by (netem|delay line \(TAP\))\n", out)
    found = [tuple(map(float, line)) for line in re.findall(r": ([\d.]+) Mbit/s of ([\d.]+), ([\d.]+) ms of", out)]
    assert [nominal for _, nominal, _ in found] == [40.0, 4.0, 4.0]
    for rate, nominal, delay in found:
        # Never faster than named; slower only by what a busy machine makes of it.
        assert 0.5 * nominal < rate <= 1.05 * nominal
        assert 20.0 <= delay < 40.0


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_it_is_stopped(number):
    token = f"qgm-wan-test-{os.getpid()}-{number}"
    bed = run_bed("links", "--hosts", "4", "--mbit", "1", "--delay-ms", "5", env={"QGM_WAN_TEST": token})
    assert bed.stdout.readline().startswith("delay by")  # complete, with hosts that are sending for some seconds
    assert len(processes_with(token)) > 3
    bed.send_signal(number)
    bed.communicate(timeout=30)
    assert bed.returncode in (128 + number, -number)
    deadline = time.monotonic() + 20
    while processes_with(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(token) == []


@needs_namespaces
def test_failing_host_is_named_and_ends_the_others(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import os, wan_sandbox\n"
        "from wan_bed import Bed, Network\n"
        "if wan_sandbox.INSIDE not in os.environ:\n"
        "    sys.exit(wan_sandbox.run_inside([sys.executable, __file__], timeout=60))\n"
        "with Bed(Network(2, 1e7, 0.0)) as bed:\n"
        "    try:\n"
        "        bed.run(lambda h: ['sh', '-c', 'echo no luck >&2; exit 3' if h else 'sleep 50'], timeout=40)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "host 1 failed with exit code 3:\nno luck\n\n"


@needs_namespaces
def test_wrong_network_is_refused_in_one_line():
    bed = run_bed("links", "--hosts", "1")
    _, err = bed.communicate(timeout=60)
    assert (bed.returncode, err) == (2, "wan: hosts must be 2 to 64, got 1\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1e6, 0.0), "hosts must be 2 to 64, got 1"),
        ((4, 0.0, 0.0), "rate must be at least 1e5 bit/s, got 0.0"),
        ((4, float("nan"), 0.0), "rate must be at least"),
        ((4, 1e6, 2.0), "delay must be 0 to 1 s, got 2.0"),
        ((4, 1e6, 0.0, 4), "slow_host must be a host (0 to 3) or None, got 4"),
    ],
)
def test_network_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Network(*arguments)


def test_bed_is_refused_outside_a_sandbox(monkeypatch):
    monkeypatch.delenv(wan_sandbox.INSIDE, raising=False)
    with pytest.raises(RuntimeError, match="inside a sandbox only"):
        Bed(Network(2, 1e6, 0.0))


def test_missing_tool_is_the_reason(monkeypatch):
    monkeypatch.setattr(wan_sandbox, "_TOOLS", ("sh", "no-such-tool"))
    assert wan_sandbox.why_not().startswith("no-such-tool not found")


def test_table_states_speed_relative_to_all_reduce_and_goes_between_its_marks(tmp_path):
    common = {"hosts": 4, "link": "L", "delay_by": "netem", "budget": 5.0, "parameters": 1000, "steps": 9}
    common |= {"bytes_mean": 2e6, "accuracy": 0.5}
    results = [
        {**common, "method": "ddp", "seconds": 0.3},
        {**common, "method": "bare_ring", "seconds": 0.2},
    ]
    table = wan_table.markdown(results)
    assert "| 4 | L | bare exchange, ring, float32 | 200 | 1.50 | 2.00 | 50.0% (9) |" in table
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- wan table -->\nold\n<!-- end -->\nb\n")
    wan_table.put_between_marks(page, wan_table.TABLE, table)
    assert page.read_text() == f"a\n<!-- wan table -->\n{table}\n<!-- end -->\nb\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks"):
        wan_table.put_between_marks(page, wan_table.TABLE, table)


def test_overview_has_a_row_for_each_network():
    common = {"delay_by": "netem", "budget": 5.0, "parameters": 1000, "accuracy": 0.5}
    results = [
        {**common, "hosts": 4, "link": "L", "method": "ddp", "seconds": 0.3},
        {**common, "hosts": 4, "link": "L", "method": "bare_ring", "seconds": 0.2},
        {**common, "hosts": 8, "link": "L", "method": "ddp", "seconds": 0.5},
    ]
    lines = wan_table.overview(results).splitlines()
    assert lines[0].endswith("| all-reduce SGDm (DDP), float32 | bare exchange, ring, float32 |")
    assert lines[2:4] == ["| 4 | L | 300 ms, 50% | 1.50 x, 50% |", "| 8 | L | 500 ms, 50% | - |"]


def test_estimate_is_of_the_steps_that_every_method_takes():
    networks = [Network(4, 1e8, 0.001), Network(4, 1e8, 0.001, slow_host=3)]
    second = 8 * 1e6 / 1e8 / (1448 / 1514)  # for 250,000 parameters over the faster link
    fast, slow = 0.02 + 12 * 0.001 + 1.5 * second, 0.02 + 12 * 0.001 + 15 * second
    for seconds in (1.0, 60.0):
        wanted = sum(4 * 5 + 19 * step + max(0.0, seconds - 10 * step) for step in (fast, slow))
        assert wan_table.estimate(networks, ["ddp"], seconds, 250_000) == pytest.approx(wanted)
    assert wan_table.estimate(networks, ["ddp", "ddp_bf16"], 1.0, 250_000) > wan_table.estimate(
        networks, ["ddp", "one_peer_int8"], 1.0, 250_000
    )


def test_prediction_takes_the_slowest_link_and_the_gradient_of_a_gossip_method():
    common = {"hosts": 4, "link": "L", "parameters": 250_000, "slowest_rate": 1e7, "delay": 0.01}
    results = [
        {**common, "method": "ddp", "backward_seconds": 9.0},
        {**common, "method": "ddp_bf16", "backward_seconds": 9.0},
        {**common, "method": "one_peer", "backward_seconds": 0.5},
    ]
    found = {result["method"]: seconds for result, seconds in wan_table.predictions(results)}
    second = 8 * 1e6 / 1e7 / (1448 / 1514)
    assert found == {
        "ddp": pytest.approx(0.5 + 12 * 0.01 + 1.5 * second),
        "one_peer": pytest.approx(0.5 + 2 * 0.01 + second),
    }
