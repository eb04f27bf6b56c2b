"""Consensus averaging with and without quasi-global momentum: how fast do workers agree, without any gradient?

    python examples/consensus.py [FOLDER]

Workers on a ring start from random vectors and gossip. With quasi-global momentum (beta = mu = 0.9) the momentum
follows the difference that gossip makes: x+ = W (x - eta beta m_hat), m_hat <- mu m_hat + (1 - mu) (x - x+) / eta. On a
long ring, whose gossip is slow, that is much faster in the end; on a ring of 16 it is faster at first and slower later.
Prints the mean squared distance to the mean, relative to the start, beside what theory says for it, and writes
consensus.png.

Source: the setting of Lin et al. 2021 as re-implemented in aparna-aketi/global_update_tracking (avgm_consensus).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import qgm_ext as qgm

BETA = MU = 0.9
METHODS = {"gossip": "dsgd", "quasi-global momentum": "qg_dsgdm", "quasi-global momentum, Nesterov": "qg_dsgdm_n"}


def simulate(n: int, algorithm: str, steps: int, dim: int = 20_000, seed: int = 0) -> np.ndarray:
    """Relative squared distance to the mean after 0, 1, ..., ``steps`` steps on a ring of n, [steps + 1]."""
    x = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hyper = {} if algorithm == "dsgd" else {"momentum": BETA, "qg_momentum": MU}
    opt = qgm.StackedOptimizer(x, qgm.topology.ring(n), algorithm, lr=1.0, **hyper)
    nothing = torch.zeros_like(x)
    errors = [opt.consensus_distance() ** 2]
    for _ in range(steps):
        opt.step(nothing)
        errors.append(opt.consensus_distance() ** 2)
    return np.array(errors) / errors[0]


def expected(n: int, algorithm: str, steps: int) -> np.ndarray:
    """The same in expectation, [steps + 1]: each eigenvalue l of W is a mode (x, m) that a 2 x 2 matrix steps."""
    beta = {"dsgd": 0.0, "qg_dsgdm": BETA, "qg_dsgdm_n": BETA * BETA}[algorithm]
    total = np.zeros(steps + 1)
    for eigenvalue in np.sort(np.linalg.eigvalsh(qgm.topology.ring(n).matrix()))[:-1]:
        step = np.array(
            [
                [eigenvalue, -eigenvalue * beta],
                [(1 - MU) * (1 - eigenvalue), MU + (1 - MU) * eigenvalue * beta],
            ]
        )
        mode = np.array([1.0, 0.0])
        for t in range(steps + 1):
            total[t] += mode[0] ** 2
            mode = step @ mode
    return total / (n - 1)


def main(folder: Path, dim: int = 20_000) -> None:
    """Print the table and write the picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, n, steps in zip(axes, (16, 64), (150, 600), strict=True):
        shown = (10, 50, 100, steps)
        print(f"ring of {n}" + "".join(f"{f'step {t}':>22}" for t in shown))
        for label, algorithm in METHODS.items():
            found, theory = simulate(n, algorithm, steps, dim), expected(n, algorithm, steps)
            print(f"  {label:34}" + "".join(f"{found[t]:>10.2e} ({theory[t]:.2e})" for t in shown))
            axis.semilogy(found, label=label)
        axis.set(title=f"ring of {n}", xlabel="step", ylabel="squared distance to the mean, relative")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(folder / "consensus.png", dpi=120)
    print("in brackets: the expectation;", folder / "consensus.png", "written")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
