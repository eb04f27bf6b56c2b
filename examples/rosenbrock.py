"""Eight workers in Rosenbrock's valley, each pulled to another side: who gets to its end?

    python examples/rosenbrock.py [FOLDER]

f(x, y) = (1 - x)^2 + 100 (y - x^2)^2 has a narrow, curved valley with the minimum at (1, 1). Worker i sees f and a
constant pull of its own; the pulls, of length two, point in all directions and cancel out, so f is what workers have
in common. They sit on a ring. Without momentum the way along the valley is long. Plain local momentum is fast, but
it adds up each worker's own pull, tenfold with beta 0.9, and circles off the minimum. Quasi-global momentum is as fast
and settles beside it. Prints distances and writes rosenbrock.png.

A toy of this project's own: the setting of the one in Lin et al. 2021 was not found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import qgm_ext as qgm

N, LR, STEPS = 8, 5e-4, 4000
METHODS = {"DSGD": "dsgd", "DSGDm": "dsgdm", "QG-DSGDm": "qg_dsgdm"}
START, MINIMUM = torch.tensor([-1.2, 1.0], dtype=torch.float64), np.ones(2)
ANGLES = 2 * torch.pi * torch.arange(N, dtype=torch.float64) / N
PULLS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def gradients(x: Tensor) -> Tensor:
    """Of each worker's function at its own point, [N, 2]."""
    a, b = x.unbind(1)
    valley = b - a * a
    return torch.stack([-2 * (1 - a) - 400 * a * valley, 200 * valley], dim=1) + PULLS


def simulate(algorithm: str, steps: int = STEPS, lr: float = LR) -> np.ndarray:
    """Positions of all workers, [steps + 1, N, 2]."""
    opt = qgm.StackedOptimizer(START.repeat(N, 1), qgm.topology.ring(N), algorithm, lr=lr)
    path = [opt.x.clone()]
    for _ in range(steps):
        opt.step(gradients(opt.x))
        path.append(opt.x.clone())
    return torch.stack(path).numpy()


def steps_to(path: np.ndarray, distance: float) -> int | None:
    """The first step at which the average is so near the minimum; None: never."""
    near = np.linalg.norm(path.mean(axis=1) - MINIMUM, axis=1) <= distance
    return int(near.argmax()) if near.any() else None


def ends(path: np.ndarray) -> tuple[float, float]:
    """At the end: distance of the average to the minimum, and root mean square distance of the workers to it."""
    last = path[-1]
    return float(np.linalg.norm(last.mean(axis=0) - MINIMUM)), float(np.sqrt(((last - MINIMUM) ** 2).sum(1).mean()))


def main(folder: Path) -> None:
    """Print the distances and write the picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", sharex=True, sharey=True)
    x, y = np.meshgrid(np.linspace(-1.6, 1.6, 300), np.linspace(-0.6, 1.8, 300))
    for axis, (label, algorithm) in zip(axes, METHODS.items(), strict=True):
        path = simulate(algorithm)
        first, (average, workers) = steps_to(path, 0.2), ends(path)
        reached = "never" if first is None else f"after {first} steps"
        print(f"{label:9} within 0.2 of the minimum: {reached}; at the end {average:.3f} off, workers {workers:.3f}")
        axis.contour(x, y, np.log1p((1 - x) ** 2 + 100 * (y - x * x) ** 2), levels=14, cmap="Greys", linewidths=0.6)
        for worker in range(N):
            axis.plot(*path[:, worker].T, linewidth=0.6, alpha=0.6)
        axis.plot(*path.mean(axis=1).T, color="black", linewidth=1.2)
        axis.plot(*MINIMUM, "*", color="red", markersize=12)
        axis.set(title=f"{label}, {STEPS} steps", xlim=(-1.6, 1.6), ylim=(-0.6, 1.8))
    figure.savefig(folder / "rosenbrock.png", dpi=120)
    print(folder / "rosenbrock.png", "written")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
