"""CHOCO-SGD: gossip with compressed differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from qgm_ext import compressors
from qgm_ext.algorithms.base import (
    MomentumAlgorithm,
    PackedMessage,
    Pass,
    RelayPass,
    State,
    Step,
    StepResult,
    check_number,
    identity_mixing,
    register,
)
from qgm_ext.topology import Topology

Order = Literal["atc", "cta"]

_CACHED = 1 << 18  # numbers


@register
@dataclass(frozen=True, kw_only=True)
class ChocoSgd(MomentumAlgorithm):
    r"""CHOCO-SGD: workers send only the compressed difference to what their neighbours already know of them.

    .. math::
        \text{atc:}\quad & x_i^{1/2} = x_i - \eta D_i, \quad q_i = Q(x_i^{1/2} - \hat x_i), \quad
        \hat x_j \leftarrow \hat x_j + q_j, \quad
        x_i^+ = x_i^{1/2} + \gamma \Bigl( \sum_j w_{ij} \hat x_j - \hat x_i \Bigr) \\
        \text{cta:}\quad & x_i^+ = x_i - \eta D_i + \gamma \Bigl( \sum_j w_{ij} \hat x_j - \hat x_i \Bigr), \quad
        q_i = Q(x_i^+ - \hat x_i), \quad \hat x_j \leftarrow \hat x_j + q_j

    D is the gradient with weight decay, or with momentum m <- beta m + g', or g' + beta m (Nesterov); m is local.
    Q takes each parameter for itself where the optimizer knows them (in the Simulator), else a worker's whole row.
    x_hat = 0 at the start; sum_j w_ij x_hat_j is kept as one vector. With compressor "none" and gamma = 1 "atc" is
    DSGD, and "cta" is DSGD that combines first, from the second step on. A step is two fused passes around the
    compressor, and one compressed vector to each neighbour. The topology must be static: that one vector is a sum with
    one set of weights.

    Args:
        order: "atc", the paper's order [recalled], or "cta", that of the published codes.
        gamma: consensus step size in (0, 1]; the stronger the compression, the smaller it must be.
        momentum: beta in [0, 1). (Default: 0.)
        nesterov: use the Nesterov form.
        compressor: "top_k", "random_k", "qsgd", "sign", "bfloat16", "int8" or "none" (:mod:`qgm_ext.compressors`).
        ratio: part of the entries that top_k and random_k leave out, in [0, 1).
        bits: of qsgd, 1 to 16.
        unbiased: random_k and qsgd with the factor that makes their mean the vector; the codes' default is biased.
        seed: of random_k and qsgd.

    Source: Koloskova, Stich, Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
    Communication" (ICML 2019, arXiv 1902.00340); epfml/ChocoSGD (deep learning code: x_hat = 0; its convex code
    starts at x^0).
    """

    name: ClassVar[str] = "choco_sgd"
    source: ClassVar[str] = "Koloskova et al. 2019, arXiv 1902.00340"
    needs: ClassVar[str] = "symmetric, static"
    rounding_obstacle: ClassVar[str | None] = "it compresses them itself"

    momentum: float = 0.0
    nesterov: bool = False
    order: Order = "atc"
    gamma: float = 0.5
    compressor: str = "sign"
    ratio: float = 0.9
    bits: int = 4
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}")
        self.make_compressor()
        check_number("gamma", self.gamma, low=0.0, high=1.0)
        compressors.check_seed(self.seed)

    def check(self, topology: Topology, x: Tensor) -> None:
        super().check(topology, x)
        if topology.is_time_varying:
            raise ValueError(
                f"{self.name} needs a static topology, got the time-varying {topology.name!r}: what a worker keeps of "
                "its neighbours' differences is summed with one set of weights"
            )

    @property
    def can_skip_gossip(self) -> bool:
        return False

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer", "known_params", "mixed_known_params", "message")

    def passes(self, step: Step) -> Iterator[Pass | RelayPass]:
        m, known, mixed, message = self.state_names
        before, after = (0.0, self.gamma) if self.order == "atc" else (self.gamma, 0.0)
        hyper = [step.lr, self.momentum, self.weight_decay, before, float(self.nesterov)]
        yield Pass("choco_send", hyper, (m, known, mixed, message), identity_mixing(step.num_workers))
        vector = step.state[message]
        compressor = self.make_compressor()
        size = sum(compressor.message_bytes(length, vector.element_size()) for _, length in step.layout.segments)
        packed = None
        if step.worker is None:
            self.compress_(vector, step.number, step.layout.segments)
        else:
            number, segments = step.number, step.layout.segments
            packed = PackedMessage(
                self.pack(vector[0], number, segments, step.worker),
                lambda data, worker, out: self.unpack(data, out, number, segments, worker),
            )
            packed.unpack(packed.data, step.worker, vector[0])
        yield Pass("choco_receive", [after], (known, mixed, message), step.mixing, message_bytes=size, packed=packed)

    def make_compressor(self) -> compressors.Compressor:
        """Build the compressor; its sign of 0 is +1, as in ChocoSGD's code."""
        if self.compressor == "sign":
            return compressors.ScaledSign(sign_of_zero=1)
        if self.compressor == "qsgd":
            return compressors.Qsgd(self.bits, self.unbiased)
        if self.compressor == "random_k":
            return compressors.RandomK(self.ratio, self.unbiased)
        return compressors.make(self.compressor, ratio=self.ratio, bits=self.bits)

    def compress_(
        self,
        vectors: Tensor,
        step: int,
        segments: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Compress in place what each worker sends in a step, [n, D], each segment for itself.

        Draws depend on seed, step and worker. What lies between segments stays.
        """
        compressor = self.make_compressor()
        rows = range(len(vectors)) if compressor.is_random else ()
        sources = [compressors.generator(self.seed, step, i) for i in rows]
        for first, length in segments or [(0, vectors.shape[1])]:
            # As many rows at a time as keep a compressor's intermediate results in the cache.
            count = max(1, _CACHED // max(1, length))
            for row in range(0, len(vectors), count):
                part = vectors[row : row + count, first : first + length]
                compressor.compress_(part, sources[row : row + count])

    def pack(self, vector: Tensor, step: int, segments: Sequence[tuple[int, int]], worker: int) -> Tensor:
        """What one worker sends in a step, [D], as bytes; :meth:`unpack` makes of them what :meth:`compress_` makes."""
        compressor, source = self.make_compressor(), compressors.generator(self.seed, step, worker)
        vector = vector.cpu()
        return torch.cat([compressor.pack(vector[first : first + length], source) for first, length in segments])

    def unpack(self, packed: Tensor, out: Tensor, step: int, segments: Sequence[tuple[int, int]], worker: int) -> None:
        """Read what ``worker`` sent into [D]; what lies between segments stays."""
        compressor, source, begin = self.make_compressor(), compressors.generator(self.seed, step, worker), 0
        packed, row = packed.cpu(), out.cpu()
        for first, length in segments:
            size = compressor.message_bytes(length, row.element_size())
            compressor.unpack(packed[begin : begin + size], row[first : first + length], source)
            begin += size
        out.copy_(row)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        m = self.momentum * state["momentum_buffer"] + g + self.weight_decay * x
        direction = g + self.weight_decay * x + self.momentum * m if self.nesterov else m
        known = state["known_params"]
        x = x - lr * direction
        if self.order == "cta":
            x = x + self.gamma * (w @ known - known)
        q = x - known
        self.compress_(q, step)
        known = known + q
        if self.order == "atc":
            x = x + self.gamma * (w @ known - known)
        return x, {"momentum_buffer": m, "known_params": known, "mixed_known_params": w @ known, "message": q}
