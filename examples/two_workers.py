"""Two workers that pull in different directions: where do plain and quasi-global momentum go?

    python examples/two_workers.py [FOLDER]

Worker 0 wants to be at (0, 5), worker 1 at (4, 0); each gradient has length one and points away from the worker's own
optimum, and both average in every step. Every point between the optima is a solution. The average reaches the segment
with either momentum. But plain local momentum adds up each worker's own pull, which never ends: before they average,
the workers stray far to both sides. Quasi-global momentum follows what averaging leaves of the pull, so they stay
together. Prints how far the averaged model is from the segment and how far the workers stray, and writes
two_workers.png.

An illustration after the one in Lin et al. 2021; that paper's exact setting was not verified.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import qgm_ext as qgm

OPTIMA = torch.tensor([[0.0, 5.0], [4.0, 0.0]], dtype=torch.float64)
METHODS = {"DSGDm": "dsgdm", "QG-DSGDm": "qg_dsgdm"}


def gradients(x: Tensor) -> Tensor:
    """Unit vectors away from each worker's optimum, [2, 2]."""
    away = x - OPTIMA
    return away / away.norm(dim=1, keepdim=True).clamp(min=1e-12)


def simulate(algorithm: str, steps: int = 300, lr: float = 0.1) -> np.ndarray:
    """Positions of both workers before and after their own step, by which they stray: [steps + 1, 2, 2]."""
    opt = qgm.StackedOptimizer(torch.zeros(2, 2, dtype=torch.float64), qgm.topology.complete(2), algorithm, lr=lr)
    path = [opt.x.clone()]
    for _ in range(steps):
        g = gradients(opt.x)
        m = next(iter(opt.state.values()))
        # The message of each worker, before it is averaged: its momentum is a trace (DSGDm) or an average (QG).
        path.append(opt.x - lr * (0.9 * m + g))
        opt.step(g)
    return torch.stack(path).numpy()


def distance_to_segment(points: np.ndarray) -> np.ndarray:
    """Distance of points [..., 2] to the segment between the optima."""
    start, end = OPTIMA.numpy()
    along = np.clip(((points - start) @ (end - start)) / ((end - start) @ (end - start)), 0.0, 1.0)
    return np.linalg.norm(points - (start + along[..., None] * (end - start)), axis=-1)


def main(folder: Path) -> None:
    """Print the distances and write the picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharex=True, sharey=True)
    for axis, (label, algorithm) in zip(axes, METHODS.items(), strict=True):
        path = simulate(algorithm)
        mean = path.mean(axis=1)
        late = slice(len(path) // 2, None)
        apart = np.linalg.norm(path[:, 0] - path[:, 1], axis=1)
        off = distance_to_segment(mean[late]).mean()
        print(f"{label:9} second half: average {off:.3f} off the segment, workers stray {apart[late].mean():.3f} apart")
        for worker in range(2):
            axis.plot(*path[:, worker].T, linewidth=0.8, alpha=0.7, label=f"worker {worker}, before averaging")
        axis.plot(*mean.T, color="black", linewidth=1.2, label="average")
        axis.plot(*OPTIMA.numpy().T, "--", color="grey", label="solutions")
        axis.plot(*OPTIMA.numpy().T, "*", color="red", markersize=12)
        axis.set(title=label, xlabel="first coordinate", ylabel="second coordinate")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "two_workers.png", dpi=120)
    print(folder / "two_workers.png", "written")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
