"""StackedOptimizer: the parameters, gradients and state of n workers on one device, stepped by one fused pass.

It knows vectors, not models (:mod:`qgm_ext.simulator`) and not process groups (:mod:`qgm_ext.distributed`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qgm_ext import algorithms, messages, ops
from qgm_ext.algorithms import Algorithm, Pass, RelayPass, Step, check_number
from qgm_ext.algorithms.planning import plan_ahead
from qgm_ext.flat import FlatLayout, padded
from qgm_ext.topology import Topology

__all__ = ["NonFiniteGradientError", "OnNonfinite", "Plan", "StackedOptimizer"]

OnNonfinite = Literal["raise", "skip", "ignore"]


class NonFiniteGradientError(ValueError):
    """A gradient held an infinity or NaN; parameters and state are as before the step."""


@dataclass(frozen=True)
class Plan:
    """What a step will launch, known before it starts; see :meth:`StackedOptimizer.plan`.

    Args:
        parts: its passes.
        lr: its step size.
        scalars: the algorithm's numbers of each worker after it.
        bytes_sent: by all workers together.
    """

    parts: tuple[Pass | RelayPass, ...]
    lr: float
    scalars: dict[str, Tensor]
    bytes_sent: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for steps that launch the same kernels with the same numbers, those of each worker excepted.

        Mixing matrices and trees are named by their identity, so the plan must live as long as the key.
        """
        return tuple(
            (part.rule, *part.hyper, *part.state, id(part.trees), part.messages)
            if isinstance(part, RelayPass)
            else (part.rule, *part.hyper, *part.state, id(part.mixing))
            for part in self.parts
        )

    def copy_numbers(self, prepared: tuple[Pass | RelayPass, ...]) -> None:
        """Copy this step's numbers of each worker to where the passes of an equal plan read them."""
        for part, place in zip(self.parts, prepared, strict=True):
            source, target = _numbers(part), _numbers(place)
            if source is not None and target is not None:
                target.copy_(source.to(target.dtype), non_blocking=True)


class StackedOptimizer:
    """Decentralized training of n workers whose parameters are the rows of one matrix.

    Args:
        x: parameters, [n, D], float64|float32|bfloat16|float16, rows contiguous, any row stride. Kept, and updated in
            place; all workers usually start from the same row. ``opt.x`` is always the point at which the next
            gradient is to be taken.
        topology: who averages with whom, of n workers (:mod:`qgm_ext.topology`).
        algorithm: a name from :func:`qgm_ext.algorithms.names`, or an Algorithm.
        on_nonfinite: what a gradient with an infinity or NaN does: "ignore" steps all the same, as torch does; "skip"
            leaves everything as it is and counts the step in ``skipped_steps``; "raise" leaves everything as it is
            and raises. The last two read the gradient once more, and wait for the device.
        layout: where single parameters lie in a row: compressors and what else goes parameter by parameter (qg_dadam's
            variant v1) then take each for itself, and gaps are not sent. (Default: a row is one parameter, a vector.)
        message: how messages to neighbours are written (:mod:`qgm_ext.messages`): "float32", which is as they are (also
            float64), or "bfloat16" or "int8" with error feedback. The step is then not one fused pass, but what a
            process for each worker does.
        **hyper: hyper-parameters of the algorithm, if it is given by name: lr, momentum, ...

    Attributes:
        lr: step size of all later steps; may be assigned.
        num_steps: steps taken. ``skipped_steps``: those left out for a gradient that was not finite.
        bytes_sent: what all workers together have sent, in bytes; ``bytes_sent_per_step``: in the last step. A message
            is one vector in the compute dtype to one neighbour, an exact mean 2 (n - 1) of them.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named with what was expected and what came.

    Example:
        >>> import qgm_ext as qgm
        >>> x = torch.zeros(4, 3)
        >>> opt = qgm.StackedOptimizer(x, qgm.topology.ring(4), "qg_dsgdm_n", lr=0.5, momentum=0.0)
        >>> opt.step(torch.ones(4, 3))
        >>> opt.x[0].tolist()
        [-0.5, -0.5, -0.5]
    """

    _takes_models = False

    def __init__(
        self,
        x: Tensor,
        topology: Topology,
        algorithm: str | Algorithm,
        *,
        on_nonfinite: OnNonfinite = "ignore",
        layout: FlatLayout | None = None,
        message: str = "float32",
        **hyper: Any,
    ) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        compute = ops.compute_dtype(x.dtype)
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"x must have shape [n, D] with n >= 1 and D >= 1, got {list(x.shape)}")
        if (x.shape[1] > 1 and x.stride(1) != 1) or (x.shape[0] > 1 and x.stride(0) < x.shape[1]):
            raise ValueError(f"x must have contiguous rows that don't overlap, got strides {x.stride()}")
        if not isinstance(topology, Topology):
            raise TypeError(f"topology must be a qgm_ext.topology.Topology, got {type(topology).__name__}")
        if topology.num_workers != x.shape[0]:
            raise ValueError(f"topology has {topology.num_workers} workers, but x has {x.shape[0]} rows")
        if on_nonfinite not in get_args(OnNonfinite):
            raise ValueError(f"on_nonfinite must be one of {', '.join(get_args(OnNonfinite))}, got {on_nonfinite!r}")
        if isinstance(algorithm, str):
            algorithm = algorithms.get(algorithm, **hyper)
        elif not isinstance(algorithm, Algorithm):
            raise TypeError(f"algorithm must be a name or an Algorithm, got {type(algorithm).__name__}")
        elif hyper:
            raise TypeError(f"hyper-parameters ({', '.join(hyper)}) go with an algorithm's name; change the Algorithm")
        if algorithm.needs_model and not self._takes_models:
            raise ValueError(
                f"{algorithm.name} needs more than one gradient a step, which StackedOptimizer can't compute; use "
                "qgm_ext.Simulator"
            )
        self.x = x.detach()
        self.topology = topology
        self.algorithm = algorithm
        self.lr = algorithm.lr
        self.on_nonfinite = on_nonfinite
        self.num_steps = 0
        self.skipped_steps = 0
        n, dim = x.shape
        algorithm.check(topology, self.x)
        self._layout = FlatLayout([(dim,)], alignment=1) if layout is None else layout
        if self._layout.size != dim:
            raise ValueError(f"layout has {self._layout.size} elements, but x has rows of {dim}")
        self.bytes_sent = 0
        self.bytes_sent_per_step = 0
        self._previous_lr: float | None = None
        self._state = {
            name: torch.zeros(algorithm.state_rows(name, topology), padded(dim), dtype=compute, device=x.device)[
                :, :dim
            ]
            for name in algorithm.state_names
        }
        algorithm.start_state(topology, self.x, self._state)
        self._message, self._written = message, messages.make(message, [algorithm])
        for name in () if self._written is None else messages.memory_names(algorithm):
            self._state[name] = torch.zeros(n, padded(dim), dtype=compute, device=x.device)[:, :dim]
        self._scalars = algorithm.initial_scalars(n)
        self._reads_between_passes = False

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The numbers that the algorithm keeps for each worker, by name, [n] float64; most keep none."""
        return dict(self._scalars)

    @property
    def state(self) -> dict[str, Tensor]:
        """The state vectors by name, each [n, D], float32 (float64 for float64 parameters)."""
        return dict(self._state)

    @torch.no_grad()
    def step(self, g: Tensor, lr: float | None = None) -> None:
        """One step of all workers: local step, gossip averaging, new parameters and state.

        Args:
            g: gradients at ``opt.x``, like x; not changed.
            lr: step size of this step alone; None takes ``opt.lr``, which may be assigned.

        Raises:
            TypeError, ValueError: if g or lr does not fit.
            NonFiniteGradientError: with on_nonfinite="raise". In every case x and state are untouched.
        """
        eta = self.lr if lr is None else lr
        check_number("lr", eta, low=0.0)
        if not isinstance(g, Tensor):
            raise TypeError(f"g must be a torch.Tensor, got {type(g).__name__}")
        if g.shape != self.x.shape or g.dtype != self.x.dtype or g.device != self.x.device:
            raise ValueError(
                f"g must be like x, {list(self.x.shape)} {self.x.dtype} on {self.x.device}, "
                f"got {list(g.shape)} {g.dtype} on {g.device}"
            )
        if self.on_nonfinite != "ignore" and not self._gradient_is_finite(g):
            self.skipped_steps += 1
            return
        self._advance(g, eta)
        self._previous_lr = eta or self._previous_lr
        self.num_steps += 1

    def plan(self, lr: float | None = None) -> Plan | None:
        """What :meth:`step` would launch now, without doing it.

        Args:
            lr: as in :meth:`step`.

        Returns:
            None if that is not known in advance: the algorithm looks at parameters, gradients or state between its
            passes, or the gradients are to be checked first (on_nonfinite), or messages are rounded.

        Raises:
            ValueError: if lr does not fit.
        """
        eta = self.lr if lr is None else lr
        check_number("lr", eta, low=0.0)
        if self.on_nonfinite != "ignore" or self._reads_between_passes or self._written is not None:
            return None
        step = self._step_with(self.x, self.x, self._state, eta)
        parts = plan_ahead(self.algorithm, step)
        if parts is None:
            self._reads_between_passes = True
            return None
        return Plan(parts, eta, step.scalars, sum(map(self._bytes_of, parts)))

    def prepare(self, plan: Plan) -> tuple[Pass | RelayPass, ...]:
        """The passes of a plan with everything that they read on the device, in memory of its own, to be launched
        again and again; numbers of each worker are those of :meth:`Plan.copy_numbers`.
        """
        compute, device = ops.compute_dtype(self.x.dtype), self.x.device
        prepared: list[Pass | RelayPass] = []
        for part in plan.parts:
            if isinstance(part, RelayPass):
                part.trees.tensors(device)
                counts = torch.empty(part.counts.shape, dtype=compute, device=device)
                prepared.append(replace(part, counts=counts))
                continue
            part.mixing.tensors(device, compute)
            scalars = part.row_scalars
            if scalars is not None:
                scalars = torch.empty(scalars.shape, dtype=compute, device=device)
            prepared.append(replace(part, row_scalars=scalars))
        return tuple(prepared)

    def commit(self, plan: Plan) -> None:
        """Count a planned step whose passes have been launched."""
        self._count(plan.bytes_sent, plan.scalars)
        self._previous_lr = plan.lr or self._previous_lr
        self.num_steps += 1

    def _step_with(self, x: Tensor, g: Tensor, state: dict[str, Tensor], eta: float) -> Step:
        previous = eta if self._previous_lr is None else self._previous_lr
        return Step(self.num_steps, eta, previous, self.topology, x, g, state, dict(self._scalars), self._layout)

    def _advance(self, g: Tensor, eta: float) -> None:
        """The step itself, after the checks."""
        step, sent = self._step_with(self.x, g, self._state, eta), 0
        for part in self.algorithm.passes(step):
            self.launch(part, g)
            sent += self._bytes_of(part)
        self._count(sent, step.scalars)

    def _count(self, sent: int, scalars: dict[str, Tensor]) -> None:
        self.bytes_sent_per_step = sent
        self.bytes_sent += sent
        self._scalars = scalars

    def launch(self, part: Pass | RelayPass, g: Tensor) -> None:
        """Run one pass of a step."""
        compute = ops.compute_dtype(self.x.dtype)
        state = [self._state[name] for name in part.state]
        if isinstance(part, RelayPass):
            counts = part.counts.to(compute).to(self.x.device, non_blocking=True)
            tensors = part.trees.tensors(self.x.device)
            ops.relay_step_(self.x, g, state, self._state[part.messages], tensors, counts, part.rule, part.hyper)
            return
        numbers = (part.row_scalars, part.block_sums)
        written = self._format_of(part)
        if written is not None:
            errors = messages.memories(self._state)
            messages.rounded_gossip_step_(
                self.x, g, state, errors, part.mixing, written, part.rule, part.hyper, *numbers
            )
            return
        mixing = part.mixing.tensors(self.x.device, compute)
        ops.gossip_step_(self.x, g, state, mixing, part.mixing.form, part.rule, part.hyper, *numbers)

    def _bytes_of(self, part: Pass | RelayPass) -> int:
        """What all workers together send for one pass."""
        compute = ops.compute_dtype(self.x.dtype)
        vector = self._num_sent * compute.itemsize
        if isinstance(part, RelayPass):
            return self._state[part.messages].shape[0] * vector
        # An all-reduce moves 2 (n - 1) / n vectors for each worker.
        links = 2 * (len(self.x) - 1) if part.exact_mean else part.mixing.num_links
        if part.message_bytes is not None:
            return links * part.message_bytes
        written = self._format_of(part)
        if written is not None:
            vector = sum(written.message_bytes(length, compute.itemsize) for _, length in self._layout.segments)
        return links * vector * ops.rules("cuda" if self.x.is_cuda else "cpu")[part.rule].messages

    def _format_of(self, part: Pass) -> messages.MessageFormat | None:
        """How the messages of a pass are written; None if they are sent as they are, or none are."""
        return None if part.exact_mean or part.mixing.num_links == 0 else self._written

    @property
    def _num_sent(self) -> int:
        """How many numbers a vector holds, gaps left out."""
        return sum(length for _, length in self._layout.segments)

    def _gradient_is_finite(self, g: Tensor) -> bool:
        finite = ops.rows_are_finite(g)
        if finite.all():
            return True
        if self.on_nonfinite == "raise":
            bad = (~finite).nonzero().flatten().tolist()
            raise NonFiniteGradientError(
                f"the gradient of worker{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))} is not finite in step "
                f"{self.num_steps}; parameters and state are as before it (on_nonfinite='skip' leaves such steps out)"
            )
        return False

    def consensus_distance(self) -> float:
        """How far the workers are apart: sqrt((1/n) sum_i ||x_i - mean||^2)."""
        return float(ops.consensus_distance(self.x))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides x: algorithm, step number, lr and the state vectors (not copied)."""
        return {
            "algorithm": self.algorithm.describe(),
            "message": self._message,
            "num_steps": self.num_steps,
            "skipped_steps": self.skipped_steps,
            "lr": self.lr,
            "previous_lr": self._previous_lr,
            "bytes_sent": self.bytes_sent,
            "state": dict(self._state),
            "scalars": dict(self._scalars),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of the same algorithm, copying its vectors.

        Raises:
            ValueError: if it is of another algorithm or shape, or incomplete; nothing has been changed then.
        """
        missing = self.state_dict().keys() - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(sorted(missing))}")
        mine, theirs = self.algorithm.describe(), state_dict["algorithm"]
        if mine != theirs:
            differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            raise ValueError(
                "state_dict is of another algorithm: "
                + ", ".join(f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} here" for key in differing)
            )
        if state_dict["message"] != self._message:
            raise ValueError(f"state_dict is of messages in {state_dict['message']}, but here they are {self._message}")
        state = state_dict["state"]
        if state.keys() != self._state.keys():
            raise ValueError(f"state_dict must hold the state vectors {sorted(self._state)}, got {sorted(state)}")
        for name, vector in self._state.items():
            if state[name].shape != vector.shape or state[name].dtype != vector.dtype:
                raise ValueError(
                    f"state {name} must be {list(vector.shape)} {vector.dtype}, "
                    f"got {list(state[name].shape)} {state[name].dtype}"
                )
        scalars = state_dict["scalars"]
        if scalars.keys() != self._scalars.keys():
            raise ValueError(f"state_dict must hold the scalars {sorted(self._scalars)}, got {sorted(scalars)}")
        for name, vector in self._state.items():
            vector.copy_(state[name])
        self._scalars = {name: scalars[name].to(self._scalars[name]).clone() for name in self._scalars}
        self._previous_lr = state_dict["previous_lr"]
        self.bytes_sent = state_dict["bytes_sent"]
        self.num_steps = state_dict["num_steps"]
        self.skipped_steps = state_dict["skipped_steps"]
        self.lr = state_dict["lr"]

    def __repr__(self) -> str:
        n, dim = self.x.shape
        return f"StackedOptimizer({n} workers, D={dim}, {self.topology.name}, {self.algorithm})"


def _numbers(part: Pass | RelayPass) -> Tensor | None:
    """The numbers of each worker that a pass takes."""
    return part.counts if isinstance(part, RelayPass) else part.row_scalars
