"""NGC and N-SADDLe."""

from __future__ import annotations

import torch

from rows.base import AlgorithmRow, Digits, Point, Quadratics, stand_still
from rows.slow import Worker, batches, lr_at, mixed, neighbours, per_tensor, scaled_sign


def slow_ngc(a, model, start, topo, steps):
    n, rho, compressed = len(start), getattr(a, "rho", 0.0), a.name.startswith("comp")
    workers, p = [Worker(model) for _ in range(n)], list(start)
    m = [torch.zeros_like(start[0]) for _ in range(n)]
    previous_x, previous_lr = p, lr_at(0)
    error: dict[tuple[int, int], torch.Tensor] = {}

    def sent(i, j, g):
        if not compressed:
            return g
        total = error.get((i, j), torch.zeros_like(g)) + g
        c = per_tensor(model, total, scaled_sign)
        error[i, j] = total - c
        return c

    def mix(t):
        x = mixed(p, topo.matrix(t), a.gamma)
        if a.quasi_global:
            for i in range(n):
                m[i] = a.momentum * m[i] + (1 - a.momentum) * (previous_x[i] - x[i]) / previous_lr
        return x

    for t in range(steps):
        w, lr, data = topo.matrix(t), lr_at(t), list(zip(*batches(t, n), strict=True))
        x = mix(t)
        own = [sent(i, i, workers[i].sharp_gradient(x[i], data[i], rho, own=True)) for i in range(n)]
        cross = {
            (i, j): sent(i, j, workers[i].sharp_gradient(p[j], data[i], rho))
            for i in range(n)
            for j in neighbours(w, i)
        }
        new_p = []
        for i in range(n):
            around = neighbours(w, i)
            local = (own[i] + sum(cross[i, j] for j in around)) / (len(around) + 1)
            data_variant = own[i] + sum(cross[j, i] for j in around if (j, i) in cross)
            g = (1 - a.alpha) * local + a.alpha * data_variant / (len(around) + 1) + a.weight_decay * x[i]
            buffer = a.momentum * m[i] + g
            new_p.append(x[i] - lr * (g + a.momentum * buffer if a.nesterov else buffer))
            if not a.quasi_global:
                m[i] = buffer
        p, previous_x, previous_lr = new_p, x, lr
    x = mix(steps)
    found = {"x": x, "sent_params": p, a.momentum_name: m}
    if compressed:
        found["own_error_memory"] = [error[i, i] for i in range(n)]
        found["link_error_memory"] = [error[i, j] for i in range(n) for j in neighbours(topo.matrix(), i)]
    return found, workers


def ngc_point(lr: float, alpha: float, rho: float = 0.0) -> Point:
    """Where p = x - lr G stands still, with x = W p, the gradients of a worker's data at x_i and at the neighbours'
    p_j (a), and those of the neighbours' data at p_i (b): G = (1 - alpha) a + alpha b. lr is that of the whole step,
    momentum included.
    """

    def solve(problem: Quadratics, w: torch.Tensor) -> torch.Tensor:
        around = [neighbours(w, i) for i in range(len(w))]

        def step(p: torch.Tensor) -> torch.Tensor:
            x = w @ p
            at_own = problem.sharp_gradient(x, rho)
            # Row j of at[i] is the gradient of the data of i at p_j.
            at = [problem.of_worker(i).sharp_gradient(p, rho) for i in range(len(w))]
            g = torch.empty_like(p)
            for i, near in enumerate(around):
                local = (at_own[i] + sum(at[i][j] for j in near)) / (len(near) + 1)
                received = (at_own[i] + sum(at[j][i] for j in near)) / (len(near) + 1)
                g[i] = (1 - alpha) * local + alpha * received
            return x - lr * g

        return w @ stand_still(step, torch.zeros_like(problem.a))

    return solve


LOCAL = {"lr": 0.01, "momentum": 0.8}  # a step of 0.01 / (1 - 0.8), with or without Nesterov's form
ALGORITHMS = {
    "ngc": AlgorithmRow(
        {**LOCAL, "alpha": 0.3},
        ngc_point(0.05, 0.3),
        Digits(0.3, epochs=5),  # here and below: several gradients a step, and so fewer steps
        slow=slow_ngc,
        cases={
            "heavy-ball": {"nesterov": False, "weight_decay": 0.01, "alpha": 0.3, "gamma": 0.6},
            "nesterov": {"alpha": 1.0, "momentum": 0.8},
            "model-variant": {"alpha": 0.0},
            "quasi-global": {"quasi_global": True, "nesterov": False, "weight_decay": 0.01, "alpha": 0.5},
            "quasi-global-nesterov": {"quasi_global": True, "gamma": 0.5, "momentum": 0.8},
        },
    ),
    # Error feedback keeps moving among the few values that a compressor has, so the point is that without compression.
    "comp_ngc": AlgorithmRow(
        {"lr": 0.05, "momentum": 0.8, "quasi_global": True, "compressor": "none"},
        ngc_point(0.05 * 1.8, 1.0),
        Digits(0.3, epochs=5),
        slow=slow_ngc,
        cases={
            "nesterov": {"alpha": 0.4, "weight_decay": 0.01, "momentum": 0.8},
            "quasi-global": {"quasi_global": True, "nesterov": False, "gamma": 0.5},
        },
    ),
    "n_saddle": AlgorithmRow(
        {**LOCAL, "alpha": 0.6, "rho": 0.1},
        ngc_point(0.05, 0.6, 0.1),
        Digits(0.3, epochs=5),
        slow=slow_ngc,
        cases={
            "nesterov": {"rho": 0.1, "alpha": 0.4, "weight_decay": 0.01},
            "quasi-global": {"rho": 0.05, "quasi_global": True, "nesterov": False},
        },
    ),
    "comp_n_saddle": AlgorithmRow(
        {**LOCAL, "nesterov": False, "rho": 0.1, "compressor": "none"},
        ngc_point(0.05, 1.0, 0.1),
        Digits(0.3, epochs=5),
        slow=slow_ngc,
        cases={"sign": {"rho": 0.1, "compressor": "sign", "alpha": 0.4, "weight_decay": 0.01}},
    ),
}
