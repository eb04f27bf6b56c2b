"""CCL."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rows.base import AlgorithmRow, Digits, dsgd_point
from rows.slow import BATCH, Worker, batches, flat, lr_at, mixed, neighbours


def slow_ccl(a, model, start, topo, steps):
    n, beta = len(start), a.momentum
    workers, p = [Worker(model) for _ in range(n)], list(start)
    m = [torch.zeros_like(start[0]) for _ in range(n)]
    previous_lr = lr_at(0)

    def mix(t):
        x = mixed(p, topo.matrix(t), a.gamma)
        for i in range(n):
            m[i] = m[i] - (x[i] - p[i]) / previous_lr
        return x

    def features(module, inputs):
        return module[:5](inputs)

    for t in range(steps):
        w, lr, data = topo.matrix(t), lr_at(t), list(zip(*batches(t, n), strict=True))
        x = mix(t)
        new_p = []
        for i in range(n):
            inputs, y = data[i]
            module = workers[i].module_at(x[i])
            z = features(module, inputs)
            loss = F.cross_entropy(module[5:](z), y)
            received = []
            for j in neighbours(w, i):
                zc = features(workers[i].module_at(p[j], train=False), inputs).detach()
                loss = loss + a.lambda_m * ((z - zc) ** 2).mean()
                theirs = features(workers[j].module_at(p[i], train=False), data[j][0]).detach()
                received.append((theirs, data[j][1]))
            received.append((z.detach(), y))
            target = torch.zeros_like(z)
            for s in range(BATCH):
                same = [v for values, classes in received for v, c in zip(values, classes, strict=True) if c == y[s]]
                target[s] = sum(same) / len(same)
            loss = loss + a.lambda_d * ((z - target) ** 2).mean()
            g = flat(torch.autograd.grad(loss, list(module.parameters()))) + a.weight_decay * x[i]
            m[i] = beta * m[i] + g
            new_p.append(x[i] - lr * (g + beta * m[i] if a.nesterov else m[i]))
            workers[i].later = dict(module.named_buffers())
        for worker in workers:  # after all have used the buffers of before
            worker.model.load_state_dict({**worker.model.state_dict(), **worker.later})
        p, previous_lr = new_p, lr
    x = mix(steps)
    return {"x": x, "sent_params": p, "momentum_buffer": m}, workers


ALGORITHMS = {
    # Without its terms; the buffer takes what gossip moves, too, so that Nesterov's form changes the step.
    "ccl": AlgorithmRow(
        {"lr": 0.05, "momentum": 0.8, "lambda_m": 0.0, "lambda_d": 0.0},
        dsgd_point(0.05 / (1 - 0.8 + 0.8**2)),
        Digits(0.1),
        slow=slow_ccl,
        cases={
            "both-terms": {"nesterov": False, "lambda_m": 0.5, "lambda_d": 0.7, "weight_decay": 0.01, "gamma": 0.6},
            "nesterov": {"lambda_m": 0.3, "lambda_d": 0.4, "momentum": 0.8},
            "model-variant": {"lambda_m": 1.0, "lambda_d": 0.0},
            "data-variant": {"lambda_m": 0.0, "lambda_d": 1.0, "nesterov": False},
            "plain": {"lambda_m": 0.0, "lambda_d": 0.0, "weight_decay": 0.01},
        },
    ),
}
