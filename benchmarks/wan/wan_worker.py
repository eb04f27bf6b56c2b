"""What each host of the WAN test bed runs: the methods one after the other, each from the same model on the same data.

Rank 0 prints one JSON line with a result for each method.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional
from wan_bed import INTERFACE
from wan_methods import METHODS, Trained

from qgm_ext import data

_LR = 0.02
_ALPHA = 1.0
_WARM_UP, _TIMED = 3, 6


def _model(width: int, depth: int) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU()]
    for _ in range(depth - 1):
        layers += [torch.nn.Linear(width, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 10))


def _sent() -> int:
    """Bytes that have left this host, with all headers."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


class _Run:
    """The training of one method on one host.

    Attributes:
        step: steps done so far.
        seconds, backward: of the last :meth:`train`, in all and in forward and backward.
    """

    def __init__(self, trained: Trained, batches: data.WorkerBatches, rank: int) -> None:
        self._trained, self._batches, self._rank = trained, batches, rank
        self.step = 0
        self.seconds = self.backward = 0.0

    def train(self, count: int) -> None:
        self.backward, begin = 0.0, time.perf_counter()
        for _ in range(count):
            x, y = (part[self._rank] for part in self._batches.at(self.step))
            before = time.perf_counter()
            functional.cross_entropy(self._trained.forward(x), y).backward()
            self.backward += time.perf_counter() - before
            self._trained.step()
            self.step += 1
        self.seconds = time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int)
    parser.add_argument("--hosts", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--width", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--methods", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['MASTER_ADDR']}:29500",
        rank=given.rank,
        world_size=given.hosts,
        timeout=timedelta(seconds=120),
    )
    dataset = data.load("digits")
    partition = data.dirichlet_partition(dataset.train_y.numpy(), given.hosts, _ALPHA, seed=0)
    batches = data.WorkerBatches(dataset.train_x, dataset.train_y, partition, given.batch, seed=0)
    results = []
    for name in given.methods:
        model = _model(given.width, given.depth)
        run = _Run(METHODS[name][1](given.hosts)(model, _LR), batches, given.rank)
        run.train(_WARM_UP)
        run.train(_TIMED)
        slowest = torch.tensor([run.seconds / _TIMED])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        # All make the same number of steps: as many as fit into the time.
        count = max(10, int(given.seconds / slowest.item()))
        dist.barrier()
        sent = _sent()
        run.train(count)
        sent = _sent() - sent
        with torch.no_grad():
            accuracy = (model(dataset.test_x).argmax(1) == dataset.test_y).float().mean().item()
        found = torch.tensor([run.seconds, sent, accuracy * count, run.backward], dtype=torch.float64) / count
        every = [torch.empty_like(found) for _ in range(given.hosts)]
        dist.all_gather(every, found)
        table = torch.stack(every)
        results.append(
            {
                "method": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "steps": run.step,
                "seconds": table[:, 0].max().item(),
                "bytes_mean": table[:, 1].mean().item(),
                "accuracy": table[:, 2].mean().item(),
                "backward_seconds": table[:, 3].mean().item(),
            }
        )
        dist.barrier()
    dist.destroy_process_group()
    if given.rank == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
