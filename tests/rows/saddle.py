"""Q-SADDLe."""

from __future__ import annotations

import torch

from rows.base import AlgorithmRow, Digits, Point, Quadratics, stand_still
from rows.slow import Worker, batches, lr_at, per_tensor, scaled_sign


def sharp_half_steps(a, workers, x, m_hat, t):
    """Every worker's model after its local step, with the gradient up the slope."""
    lr, data, half = lr_at(t), list(zip(*batches(t, len(x)), strict=True)), []
    for i, worker in enumerate(workers):
        g = worker.sharp_gradient(x[i], data[i], a.rho, own=True) + a.weight_decay * x[i]
        m = a.momentum * m_hat[i] + g
        half.append(x[i] - lr * (g + a.momentum * m if a.nesterov else m))
    return half


def slow_saddle(a, model, start, topo, steps):
    n = len(start)
    workers, x = [Worker(model) for _ in range(n)], list(start)
    m_hat = [torch.zeros_like(start[0]) for _ in range(n)]
    for t in range(steps):
        w, half = topo.matrix(t), sharp_half_steps(a, workers, x, m_hat, t)
        for i in range(n):
            new = sum(w[i, j] * half[j] for j in range(n))
            m_hat[i] = a.qg_momentum * m_hat[i] + (1 - a.qg_momentum) * (x[i] - new) / lr_at(t)
            x[i] = new
    return {"x": x, "qg_momentum_buffer": m_hat}, workers


def slow_comp_saddle(a, model, start, topo, steps):
    n = len(start)
    workers, x = [Worker(model) for _ in range(n)], list(start)
    m_hat = [torch.zeros_like(start[0]) for _ in range(n)]
    public = [p.clone() for p in start]
    for t in range(steps):
        w, half = topo.matrix(t), sharp_half_steps(a, workers, x, m_hat, t)
        public = [public[i] + per_tensor(model, half[i] - public[i], scaled_sign) for i in range(n)]
        for i in range(n):
            new = half[i] + a.gamma * (sum(w[i, j] * public[j] for j in range(n)) - public[i])
            m_hat[i] = a.qg_momentum * m_hat[i] + (1 - a.qg_momentum) * (x[i] - new) / lr_at(t)
            x[i] = new
    return {"x": x, "qg_momentum_buffer": m_hat, "public_params": public}, workers


def sharp_point(lr: float, rho: float) -> Point:
    """The point of DSGD with gradients up the slope; with rho = 0 that of DSGD."""

    def solve(problem: Quadratics, w: torch.Tensor) -> torch.Tensor:
        return stand_still(lambda x: w @ (x - lr * problem.sharp_gradient(x, rho)), torch.zeros_like(problem.a))

    return solve


# A step of quasi-global momentum, with or without what the compression leaves out: that vanishes where x stands still.
HYPER = {"lr": 0.05, "momentum": 0.8}
SAM = {"rho": 0.1, "weight_decay": 0.01, "momentum": 0.8}
ALGORITHMS = {
    "q_saddle": AlgorithmRow(
        {**HYPER, "rho": 0.1},
        sharp_point(0.05, 0.1),
        Digits(0.1),
        slow=slow_saddle,
        cases={"heavy-ball": SAM, "nesterov": {**SAM, "nesterov": True, "qg_momentum": 0.7}},
    ),
    "comp_q_saddle": AlgorithmRow(
        {**HYPER, "rho": 0.1, "nesterov": True},
        sharp_point(0.05 * 1.8, 0.1),
        Digits(0.1),
        slow=slow_comp_saddle,
        cases={
            "sign": {**SAM, "compressor": "sign", "gamma": 0.4},
            "sign-nesterov": {**SAM, "nesterov": True, "compressor": "sign", "gamma": 0.3},
        },
    ),
}
