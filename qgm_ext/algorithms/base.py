"""What an algorithm is to the rest of the package: hyper-parameters, state, and the compiled rule that steps it.

The arithmetic is in csrc/rules (and, to be read, in each algorithm's ``reference_step``); this file holds the contract
and the registry, not an algorithm.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from qgm_ext.flat import FlatLayout
from qgm_ext.hints import did_you_mean
from qgm_ext.mixing import Mixing
from qgm_ext.trees import Tree, Trees

if TYPE_CHECKING:
    from qgm_ext.topology import Topology

State = dict[str, Tensor]
StepResult = tuple[Tensor, State]


@dataclass(frozen=True)
class PackedMessage:
    """A compressed message as it is sent.

    Args:
        data: [size] uint8, as many bytes as every other worker's.
        unpack: called with such bytes, the number of the worker that sent them, and [D] to be written.
    """

    data: Tensor
    unpack: Callable[[Tensor, int, Tensor], None]


@dataclass(frozen=True)
class Pass:
    """One fused pass over x, g and state: which rule, with what, mixed how.

    Args:
        rule: a name from :func:`qgm_ext.ops.rules`.
        hyper: its hyper-parameters, in the order of its header.
        state: the names of its state vectors, in the order of its header.
        mixing: how its messages are averaged.
        row_scalars: its numbers for each row of x, [rows, k], if it has any.
        block_sums: where it leaves the sums of squares of its state, :func:`qgm_ext.ops.new_block_sums` of x, if it has
            a state whose norm is needed.
        exact_mean: the messages are averaged over all workers by an all-reduce, whatever the topology; only the
            counting of bytes asks for it.
        message_bytes: bytes of all messages that a worker sends to one neighbour, if they are compressed.
        packed: in a process that is one of the workers, its compressed message.
    """

    rule: str
    hyper: list[float]
    state: tuple[str, ...]
    mixing: Mixing
    row_scalars: Tensor | None = None
    block_sums: Tensor | None = None
    exact_mean: bool = False
    message_bytes: int | None = None
    packed: PackedMessage | None = None


@dataclass(frozen=True)
class RelayPass:
    """One fused pass in which messages are relayed over trees instead of averaged with neighbours.

    Args:
        rule: dsgd, dsgdm, dsgdm_n or relay_grad, relay_grad_m, relay_grad_m_n.
        hyper: its hyper-parameters, in the order of its header.
        state: the names of its state vectors.
        messages: the name of the state that holds the messages, one row for each directed edge.
        trees: the trees.
        counts: how often a worker's own message counts, [K, n].
    """

    rule: str
    hyper: list[float]
    state: tuple[str, ...]
    messages: str
    trees: Trees
    counts: Tensor


@dataclass(frozen=True)
class Step:
    """What an algorithm knows when it says which passes a step is made of.

    The rows are those of all n workers, or, in a process that is one of them (:mod:`qgm_ext.distributed`), its own.

    Attributes:
        number: of the step, from 0.
        lr: its step size eta.
        previous_lr: the last step size before it that was not 0; ``lr`` itself if there was none.
        topology: who averages with whom.
        x: parameters, [n, D] or [1, D]: those of this moment, so after a pass the new ones.
        g: gradients, like x.
        state: the state vectors by name, like x.
        scalars: numbers that the algorithm keeps for each worker, [n] float64 by name; values may be replaced.
        layout: where each parameter lies in a row.
        worker: whose row it is, in a process of its own; None if the rows are those of all workers.
        round: how often the workers have averaged before, if that is not in every step; the time of the topology.
    """

    number: int
    lr: float
    previous_lr: float
    topology: Topology
    x: Tensor
    g: Tensor
    state: Mapping[str, Tensor]
    scalars: dict[str, Tensor]
    layout: FlatLayout
    worker: int | None = None
    round: int | None = None

    @property
    def num_workers(self) -> int:
        """n, whatever x has of them."""
        return self.topology.num_workers

    @property
    def workers(self) -> range:
        """The workers whose rows x holds."""
        return range(self.num_workers) if self.worker is None else range(self.worker, self.worker + 1)

    @property
    def mixing(self) -> Mixing:
        """The topology's mixing matrix in this step."""
        return self.topology.mixing(self.number if self.round is None else self.round)

    def own(self, values: Tensor) -> Tensor:
        """Of numbers of all workers, [n], those of the rows of x."""
        return values[self.workers.start : self.workers.stop]

    def with_own(self, values: Tensor, own: Tensor) -> Tensor:
        """Numbers of all workers, [n], with new ones for the rows of x; new memory."""
        found = values.clone()
        found[self.workers.start : self.workers.stop] = own.to(found)
        return found

    def row_scalars(self, *columns: Tensor) -> Tensor:
        """Put numbers of each row of x side by side as a rule takes them: [rows, k] in the compute dtype."""
        dtype = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        # Pageable memory has been read when the call returns, so the host need not wait for the device.
        return torch.stack(columns, dim=1).to(dtype).to(self.x.device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Hyper-parameters of one algorithm, checked when it is built. Subclasses live one in a file.

    Args:
        lr: step size eta >= 0, the default of every step. 0 mixes without a gradient step.
        weight_decay: lambda >= 0, coupled: added to the gradient before any momentum.

    Class attributes:
        name: its name in :func:`get` and on the command line.
        messages: vectors of the model's size that a worker sends to each neighbour in a step.
        source: paper, and code where it was compared.
        needs_model: whether a step takes more than the gradient at x (cross-gradients, features, a second
            gradient), for which its optimizer must have the model (:class:`qgm_ext.Simulator`,
            :class:`qgm_ext.optim.CrossGradient`); see
            :class:`qgm_ext.algorithms.cross_gradient.CrossGradientAlgorithm`.
        needs: what it asks of the topology, in words, for tables.
        any_columns: whether a mixing matrix may be column-stochastic only, as push-sum takes it.
        rounding_obstacle: why its messages can't be rounded (:mod:`qgm_ext.messages`); None if they can.

    Raises:
        ValueError: if a hyper-parameter is outside its range, not finite, or not a number.
    """

    name: ClassVar[str]
    messages: ClassVar[int] = 1
    source: ClassVar[str]
    needs_model: ClassVar[bool] = False
    needs: ClassVar[str] = "doubly stochastic"
    any_columns: ClassVar[bool] = False
    rounding_obstacle: ClassVar[str | None] = None

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_number("lr", self.lr, low=0.0)
        check_number("weight_decay", self.weight_decay, low=0.0)

    @property
    def rule(self) -> str:
        """The compiled rule (:func:`qgm_ext.ops.rules`) that steps it."""
        raise NotImplementedError

    @property
    def state_names(self) -> tuple[str, ...]:
        """The state vectors, each of the model's size, in the order of the rule if it is one rule that keeps all."""
        raise NotImplementedError

    @property
    def link_state_names(self) -> tuple[str, ...]:
        """Those of ``state_names`` with a row for each link to a neighbour instead of each worker."""
        return ()

    @property
    def can_skip_gossip(self) -> bool:
        """Whether a worker may take single steps without the others, W = I; not with exact means, relayed sums or
        copies that neighbours keep of each other.
        """
        return True

    @property
    def can_lose_workers(self) -> bool:
        """Whether those that are left may go on with the rest of the mixing matrix: no state or message is a sum over
        workers, of which a lost one would take its part along, and nothing needs all of them. Push-sum loses the mass
        that it had sent and got; relayed messages hold models of the lost, and its tree falls apart.
        """
        return False

    @property
    def can_copy_workers(self) -> bool:
        """Whether a worker may go on with a copy of another's parameters and state in place of its own: as with any
        step that moves a worker towards another, nothing but the mean changes. Not where state is a part of a sum over
        workers: corrections that cancel, relayed messages, copies that neighbours keep.
        """
        return self.can_lose_workers

    def state_rows(self, name: str, topology: Topology) -> int:
        """How many rows a state vector has: one for each worker, unless it belongs to something else."""
        return topology.num_workers

    def start_state(self, topology: Topology, x: Tensor, state: Mapping[str, Tensor]) -> None:
        """Give the state vectors, which are zero, what they start from."""
        for name, vector in state.items():
            start = self.initial_value(name)
            if start == "params":
                vector.copy_(x)
            elif start != 0.0:
                vector.fill_(start)

    def initial_value(self, name: str) -> float | Literal["params"]:
        """What a state vector starts from: a number, or the parameters."""
        return 0.0

    def initial_relay(self, tree: Tree, edge: int, x: Tensor) -> Tensor:
        """What the message of one edge of a tree starts from, for the coordinates ``x`` of the parameters."""
        return torch.zeros_like(x)

    def initial_scalars(self, n: int) -> dict[str, Tensor]:
        """The numbers that the algorithm keeps for each worker, before the first step: [n] float64 by name."""
        return {}

    def hyper(self, step: int, lr: float) -> list[float]:
        """The rule's hyper-parameters in step number ``step`` (from 0) with step size ``lr``."""
        raise NotImplementedError

    def passes(self, step: Step) -> Iterator[Pass | RelayPass]:
        """What a step is made of, in order; after ``yield`` the pass has been run."""
        yield Pass(self.rule, self.hyper(step.number, step.lr), self.state_names, step.mixing)

    def reference_step(self, x: Tensor, g: Tensor, state: State, w: Tensor, step: int, lr: float) -> StepResult:
        """The equations once more in plain PyTorch, written to be read: what tests and benchmarks compare with.

        As the source has them, divisions by the step size included, so that they check the coefficients that the
        compiled rules fold together. Changes nothing in place; any floating-point dtype. See
        :func:`qgm_ext.reference.step` for the arguments.
        """
        raise NotImplementedError(f"{self.name} has no reference_step")

    def check(self, topology: Topology, x: Tensor) -> None:
        """Refuse, or warn of, a topology or a start that this algorithm can't work with; called once, before steps."""
        if not self.any_columns and not topology.is_doubly_stochastic:
            raise ValueError(
                f"{self.name} needs a doubly stochastic mixing matrix, but some row of topology {topology.name!r} does "
                "not sum to one; sgp and qg_sgp work on such directed graphs"
            )

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, as stored in checkpoints and config files."""
        return {"name": self.name, **dataclasses.asdict(self)}


def check_number(name: str, value: Any, *, low: float, high: float = math.inf, high_open: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number in [low, high], or [low, high) if ``high_open``."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if good and low <= value <= high and not (high_open and value == high):
        return
    if high == math.inf:
        wanted = f"a finite number of at least {low:g}"
    else:
        wanted = f"in [{low:g}, {high:g}{')' if high_open else ']'}"
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


@functools.cache
def mean_mixing(n: int) -> Mixing:
    """The mixing matrix of the complete graph, 1/n everywhere: exact averaging."""
    return Mixing.from_matrix(np.full((n, n), 1.0 / n))


@functools.cache
def identity_mixing(n: int) -> Mixing:
    """The mixing matrix that mixes nothing: a pass of every worker for itself."""
    return Mixing.from_matrix(np.eye(n))


@dataclass(frozen=True, kw_only=True)
class MomentumAlgorithm(Algorithm):
    """An algorithm with momentum beta in [0, 1)."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("momentum", self.momentum, low=0.0, high=1.0, high_open=True)


@dataclass(frozen=True, kw_only=True)
class AdamAlgorithm(Algorithm):
    """An algorithm with Adam's moments: betas in [0, 1) and eps > 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for k, beta in enumerate(self.betas):
            check_number(f"betas[{k}]", beta, low=0.0, high=1.0, high_open=True)
        check_number("eps", self.eps, low=0.0)

    def adam_hyper(self, step: int, lr: float) -> list[float]:
        """eta, b1, b2, eps, wd and the bias corrections 1 - b1^t and sqrt(1 - b2^t), t = step + 1."""
        b1, b2 = self.betas
        corrections = [1.0 - b1 ** (step + 1), math.sqrt(1.0 - b2 ** (step + 1))]
        return [lr, b1, b2, self.eps, self.weight_decay, *corrections]

    def reference_direction(self, m: Tensor, v: Tensor, step: int) -> Tensor:
        """Adam's direction with its bias corrections, t = step + 1, for :meth:`reference_step`."""
        b1, b2 = self.betas
        t = step + 1
        return m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + self.eps)


_registry: dict[str, type[Algorithm]] = {}
_Class = TypeVar("_Class", bound=type[Algorithm])


def register(algorithm: _Class) -> _Class:
    """Class decorator: make an algorithm known by its name; also for algorithms outside this package.

    Raises:
        ValueError: if the name is taken by another class.
    """
    known = _registry.setdefault(algorithm.name, algorithm)
    if (known.__module__, known.__qualname__) != (algorithm.__module__, algorithm.__qualname__):
        raise ValueError(
            f"algorithm name {algorithm.name!r} is already taken by {known.__module__}.{known.__qualname__}"
        )
    _registry[algorithm.name] = algorithm
    return algorithm


def load_all(package: str, path: Any) -> None:
    """Import every module of the algorithms package, so that each registers itself."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def names() -> list[str]:
    """The names of all algorithms, sorted."""
    return sorted(_registry)


def get_class(name: str) -> type[Algorithm]:
    """The class of an algorithm.

    Raises:
        ValueError: if the name is not known; suggests the nearest.
    """
    if name not in _registry:
        hint = did_you_mean(name, _registry, f"there are {', '.join(names())}")
        raise ValueError(f"algorithm {name!r} is not known, {hint}")
    return _registry[name]


def get(name: str, **hyper: Any) -> Algorithm:
    """Build an algorithm by name.

    Args:
        name: one of :func:`names`.
        hyper: its hyper-parameters; those not given take their defaults.

    Raises:
        ValueError: if the name or a value is wrong.
        TypeError: if a hyper-parameter is missing or this algorithm does not have it.

    Example:
        >>> get("qg_dsgdm_n", lr=0.1, momentum=0.9).qg_momentum
        0.9
    """
    cls = get_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in hyper:
        if key not in fields:
            hint = did_you_mean(key, fields, f"it has {', '.join(fields)}")
            raise TypeError(f"{name} has no hyper-parameter {key!r}, {hint}")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in hyper]
    if missing:
        raise TypeError(f"{name} needs {', '.join(missing)}")
    return cls(**hyper)
