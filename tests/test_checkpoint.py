"""Checkpoints of several workers: the same bits after kill -9, the average for another number, damage named."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import qgm_ext as qgm
from process_pool import ProcessPool
from qgm_ext.distributed import checkpoint

STEPS = 10

_SCRIPT = """
import sys
import torch
import torch.distributed as dist
import qgm_ext as qgm
from qgm_ext.distributed import checkpoint

rank, size, store, folder, steps = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))
topology = qgm.topology.one_peer_exponential(size)
opt = qgm.optim.QGSGD(model.parameters(), lr=0.05, topology=topology, timeout=20.0)
found = checkpoint.load(folder, model, opt)
step = 0 if found is None else found.step
print("starts", step, flush=True)
while step < steps:
    opt.zero_grad()
    (model(torch.randn(4, 6)) ** 2).mean().backward()
    opt.step()
    step += 1
    checkpoint.save(folder, model, opt, step, extra={"step": step})
    print("saved", step, flush=True)
torch.save(model.state_dict(), f"{folder}/final-{rank}.pt")
dist.destroy_process_group()
"""


def run_once(tmp_path, folder, size, kill=None):
    """Start the workers once; kill(processes) may kill some. Whether all ended well."""
    script = tmp_path / "worker.py"
    script.write_text(_SCRIPT)
    store = tmp_path / f"store-{time.monotonic_ns()}"
    log = open(tmp_path / "log", "wb")  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(store), str(folder), str(STEPS)],
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]
    try:
        if kill is not None:
            kill(processes)
        for process in processes:
            process.communicate(timeout=90)  # a hang is a failure
    finally:
        for process in processes:
            process.kill()
            process.wait()
        log.close()
    return all(process.returncode == 0 for process in processes)


@pytest.mark.slow
def test_killed_workers_resume_to_the_same_bits(tmp_path):
    size, draw = 3, random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_once(tmp_path, whole, size), (tmp_path / "log").read_text()

    def kill_after(count, victims):
        def kill(processes):
            for line in processes[0].stdout:
                if line.startswith(b"saved"):
                    count[0] -= 1
                if count[0] <= 0:
                    break
            time.sleep(draw.uniform(0, 0.02))  # anywhere in a step or in the middle of saving
            for victim in victims:
                processes[victim].send_signal(signal.SIGKILL)

        return kill

    assert not run_once(tmp_path, killed, size, kill_after([3], [1]))
    assert not run_once(tmp_path, killed, size, kill_after([3], range(size)))
    assert run_once(tmp_path, killed, size), (tmp_path / "log").read_text()
    for rank in range(size):
        one, other = (torch.load(folder / f"final-{rank}.pt") for folder in (whole, killed))
        assert all(torch.equal(one[key], other[key]) for key in one)
    # Old steps are gone: a worker keeps the last two that are whole when it saves. Then the one that it hears from has
    # saved the step before, and the one that this one hears from the step before that, at least.
    kept = sorted(int(path.name.removeprefix("step-")) for path in killed.glob("step-*"))
    assert kept[-2:] == [STEPS - 1, STEPS]
    assert len(kept) <= 4


def train(rank, folder, steps, topology="ring"):
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    size = torch.distributed.get_world_size()
    opt = qgm.optim.QGSGD(model.parameters(), lr=0.1, topology=qgm.topology.get(topology, size))
    found = checkpoint.load(folder, model, opt)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(steps):
        opt.zero_grad()
        (model(torch.randn(5, 4)) ** 2).mean().backward()
        opt.step()
        checkpoint.save(folder, model, opt, step + 1, extra={"note": "n", "values": torch.arange(3), "pair": (1, 0.5)})
    average = checkpoint.consensus_model(model)
    fields = None if found is None else (found.step, found.resumed, found.note, found.extra)
    return fields, start, dict(model.state_dict()), dict(average.state_dict())


@pytest.fixture(scope="module")
def pool():
    with ProcessPool(3) as pool:
        yield pool


def test_another_number_of_workers_starts_from_the_average_and_says_so(pool, tmp_path):
    first = pool.run(train, 3, tmp_path, 3)
    models = [answer[2] for answer in first]
    mean = {
        key: torch.stack([model[key].double() for model in models]).mean(0).float()
        for key in models[0]
        if "num" not in key
    }
    for answer in first:
        assert answer[0] is None
        for key, value in mean.items():
            assert torch.allclose(answer[3][key], value, rtol=1e-6, atol=1e-7)
            assert torch.equal(answer[3][key], first[0][3][key])
    for (step, resumed, note, extra), start, _, _ in pool.run(train, 2, tmp_path, 0):
        assert (step, resumed) == (3, False)
        assert "was saved by 3 workers at step 3, now there are 2: all start from the average" in note
        assert extra["note"] == "n"
        assert extra["pair"] == (1, 0.5)
        assert torch.equal(extra["values"], torch.arange(3))
        for key, value in mean.items():
            assert torch.equal(start[key], value)


def alone(folder, width=4):
    model = torch.nn.Linear(width, 2)
    return model, qgm.optim.QGSGD(model.parameters(), lr=0.1), folder


def test_one_worker_without_a_process_group(tmp_path):
    model, opt, folder = alone(tmp_path / "new")
    assert checkpoint.load(folder, model, opt) is None
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    path = checkpoint.save(folder, model, opt, 1)
    other, fresh, _ = alone(folder)
    assert checkpoint.load(folder, other, fresh).step == 1
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(
        opt.state_dict()["state"][0]["qg_momentum_buffer"], fresh.state[other.weight]["qg_momentum_buffer"]
    )
    # Unfinished folders of a killed run don't count.
    (path.parent.parent / "step-00000009").mkdir()
    (path.parent.parent / "step-00000009" / ".worker-0-of-1.tmp").mkdir()
    assert checkpoint.load(folder, other, fresh).step == 1


def test_damage_and_misfit_are_named(tmp_path):
    model, opt, folder = alone(tmp_path)
    path = checkpoint.save(folder, model, opt, 1)
    wide, other, _ = alone(folder, 5)
    with pytest.raises(ValueError, match=r"worker-0-of-1 does not fit the model: .*weight"):
        checkpoint.load(folder, wide, other)
    with pytest.raises(ValueError, match="does not fit the optimizer"):
        checkpoint.load(folder, model, qgm.optim.DSGD(model.parameters(), lr=0.1))
    content = json.loads((path / "about.json").read_text())
    content["checksums"]["model.weight"] += 1
    (path / "about.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"worker-0-of-1 is damaged \(wrong checksum of model.weight\)"):
        checkpoint.load(folder, model, opt)
    for file in path.glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(folder, model, opt)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_save_refuses_steps(tmp_path, step, error):
    model, opt, folder = alone(tmp_path)
    with pytest.raises(error, match="step must be"):
        checkpoint.save(folder, model, opt, step)


def test_save_refuses_extra_that_json_can_not_hold(tmp_path):
    model, opt, folder = alone(tmp_path)
    with pytest.raises(TypeError, match="extra.thing must be a number, string, list, dict, None or tensor, got object"):
        checkpoint.save(folder, model, opt, 1, extra={"thing": object()})
    assert not list(Path(folder).glob("step-*"))


def test_exported_model_is_read_by_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, opt, _ = alone(tmp_path)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()  # parameters are views of one buffer from now on
    tied = torch.nn.Sequential(model, torch.nn.Linear(4, 2))
    tied[1].weight = model.weight
    file = tmp_path / "model.safetensors"
    checkpoint.export_safetensors(tied, file)
    assert file.stat().st_size < 1000  # not the buffer
    again = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2))
    again[1].weight = again[0].weight
    safetensors.load_model(again, str(file))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in tied.state_dict().items())
