"""The Topology class: one mixing matrix, or one for each step, what it says about itself, and how it is drawn.

Static, cyclic and random-matching topologies; their spectral gaps, degrees, neighbours, equality and description. How
they are made and checked is in :mod:`qgm_ext.topology`, which is what users import.
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from qgm_ext import graphs
from qgm_ext.files import naming
from qgm_ext.graphs import Edges
from qgm_ext.mixing import Mixing
from qgm_ext.trees import Tree, Trees

_SYMMETRY_TOLERANCE = 1e-12
# A product of mixing matrices this close to the mean is exact averaging (one-peer exponential graph, n a power of 2).
_EXACT_AVERAGE = 1e-12


class Topology(ABC):
    """Who averages with whom: one mixing matrix, or one for each step. Immutable; made by the functions below.

    Two topologies are equal when they mix alike at every step; the name doesn't count.

    Attributes:
        name: the constructor's name, e.g. "ring".
        num_workers: n.
        arguments: what else the constructor was given, e.g. ``{"p": 0.3, "seed": 0}``.
        period: 1 if static, p if the matrices repeat every p steps, None if they never repeat.
    """

    name: str
    num_workers: int
    arguments: Mapping[str, Any]
    period: int | None

    def __init__(self, name: str, num_workers: int, arguments: Mapping[str, Any], period: int | None) -> None:
        for key, value in (
            ("name", name),
            ("num_workers", num_workers),
            ("arguments", MappingProxyType(dict(arguments))),
        ):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "period", period)

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"a Topology can't be changed: can't set {key!r}")

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f"a Topology can't be changed: can't delete {key!r}")

    @property
    def is_time_varying(self) -> bool:
        """Whether different steps mix differently."""
        return self.period != 1

    @abstractmethod
    def at(self, step: SupportsIndex = 0) -> Topology:
        """Return the static topology of one step, step >= 0; a static topology returns itself.

        Raises:
            TypeError: if step is no integer.
            ValueError: if it is negative.
        """

    @property
    @abstractmethod
    def spectral_gap(self) -> float:
        """1 - rho, in [0, 1]: by how much a step brings the workers closer. 1 is exact averaging, 0 no progress.

        J is the matrix of 1/n, ||.|| the spectral norm (largest singular value).

        - static: rho = ||W - J||; the root mean square distance of the workers from their mean shrinks at least by rho
          in each step. For a symmetric W that is max(|lambda_2|, |lambda_n|).
        - p matrices in turn: rho = ||W_{p-1} ... W_0 - J|| ** (1/p), the mean per step over a period.
        - random matrices: rho = sqrt(||E[W^T W] - J||), the root of the expected shrinking of the squared distance.
        """

    @abstractmethod
    def _content(self) -> tuple[bytes, ...]:
        """Return bytes that two topologies share exactly if they mix alike."""

    @abstractmethod
    def _sample(self) -> list[Topology]:
        """Return static topologies that stand for all steps: the period, or the first steps of an aperiodic one."""

    def mixing(self, step: SupportsIndex = 0) -> Mixing:
        """Return the mixing matrix of one step as the kernels read it; the same object each time."""
        return self.at(step).mixing()

    def matrix(self, step: SupportsIndex = 0) -> NDArray[np.float64]:
        """Return the mixing matrix of one step, [n, n] float64, newly allocated; row i is what worker i receives.

        Example:
            >>> from qgm_ext.topology import ring
            >>> ring(2).matrix().tolist()
            [[0.5, 0.5], [0.5, 0.5]]
        """
        return self.mixing(step).to_matrix()

    def neighbors(self, worker: SupportsIndex, step: SupportsIndex = 0) -> list[int]:
        """Return the workers from which ``worker`` receives at this step, ascending, without itself.

        Raises:
            ValueError: if worker is not in [0, n).
        """
        index = self._worker(worker)
        received: list[int] = self.mixing(step).row(index)[0].tolist()
        return [sender for sender in received if sender != index]

    def out_neighbors(self, worker: SupportsIndex, step: SupportsIndex = 0) -> list[int]:
        """Return the workers to which ``worker`` sends at this step, ascending, without itself."""
        index = self._worker(worker)
        to, frm = graphs.off_diagonal_edges(self.mixing(step))
        receivers: list[int] = to[frm == index].tolist()
        return receivers

    @cached_property
    def _degrees(self) -> tuple[int, ...]:
        every = [graphs.off_diagonal_edges(part.mixing())[0] for part in self._sample()]
        most = np.max([np.bincount(to, minlength=self.num_workers) for to in every], axis=0)
        return tuple(most.tolist())

    @property
    def degrees(self) -> list[int]:
        """From how many others each worker receives in one step, [n]; for time-varying ones the most in any step."""
        return list(self._degrees)

    @property
    def is_regular(self) -> bool:
        """Whether all workers have the same degree."""
        return len(set(self.degrees)) == 1

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether w_ij = w_ji at every step, to 1e-12."""
        return all(part.is_symmetric for part in self._sample())

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        """Whether rows sum to one at every step, to 1e-9 (columns always do); if not, only push-sum works on it."""
        sums = [part.mixing().row_sums() for part in self._sample()]
        return all(bool(np.all(np.abs(row_sums - 1.0) <= 1e-9)) for row_sums in sums)

    @cached_property
    def is_connected(self) -> bool:
        """Whether every worker's message reaches every other in the end; over a period for time-varying ones."""
        return not unreached(self._sample())

    def trees(self) -> Trees:
        """Return the trees over which RelaySum sends: the graph itself, or those that the topology was made of.

        Raises:
            ValueError: if the topology is time-varying, directed or has a cycle.
        """
        raise ValueError(f"RelaySum needs a static tree, but topology {self.name!r} is time-varying")

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Eigenvalues of a static symmetric W, [n], descending; the first is 1.

        Raises:
            ValueError: if the topology is time-varying or not symmetric.
        """
        raise ValueError(
            f"eigenvalues, lambda_2 and lambda_n are those of one symmetric matrix, but topology {self.name!r} is "
            f"time-varying; use at(step) or spectral_gap"
        )

    @property
    def lambda_2(self) -> float:
        """Second largest eigenvalue of a static symmetric W; 0 for one worker. Raises as :attr:`eigenvalues`."""
        return float(self.eigenvalues[1]) if self.num_workers > 1 else 0.0

    @property
    def lambda_n(self) -> float:
        """Smallest eigenvalue of a static symmetric W (1 for one worker). Raises as :attr:`eigenvalues`."""
        return float(self.eigenvalues[-1])

    def graph(self, step: SupportsIndex = 0) -> Any:
        """Return one step's graph as a networkx Graph, or DiGraph (sender to receiver) if W is not symmetric.

        Edges carry ``weight``, nodes ``self_weight``.
        """
        import networkx as nx

        part = self.at(step)
        mixing = part.mixing()
        graph: Any = nx.Graph() if part.is_symmetric else nx.DiGraph()
        graph.add_nodes_from(range(self.num_workers), self_weight=0.0)
        for receiver, sender, weight in mixing.entries():
            if receiver == sender:
                graph.nodes[receiver]["self_weight"] = weight
            else:
                graph.add_edge(sender, receiver, weight=weight)
        return graph

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that two topologies share if they mix alike; the same on every machine."""
        digest = hashlib.sha256()
        for part in (str(self.num_workers).encode(), *self._content()):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return the figures that a person or a config.json wants, JSON-ready; what is not defined is None."""
        parts = self._sample()
        every = [part.mixing() for part in parts]
        own = np.concatenate([mixing.diagonal() for mixing in every])
        off = np.concatenate([mixing.weights[mixing.rows() != mixing.columns] for mixing in every])
        facts: dict[str, Any] = {
            "name": self.name,
            "num_workers": self.num_workers,
            "arguments": dict(self.arguments),
            "period": self.period,
            "time_varying": self.is_time_varying,
            "symmetric": self.is_symmetric,
            "connected": self.is_connected,
            "form": every[0].form,
            "degree_min": min(self.degrees),
            "degree_max": max(self.degrees),
            "messages_per_step": off.size / len(parts) if off.size % len(parts) else off.size // len(parts),
            "self_weight_min": float(own.min()),
            "self_weight_max": float(own.max()),
            "weight_min": float(off.min()) if off.size else None,
            "weight_max": float(off.max()) if off.size else None,
            "spectral_gap": self.spectral_gap,
            "lambda_2": None,
            "lambda_n": None,
            "fingerprint": self.fingerprint,
        }
        if self.is_symmetric and not self.is_time_varying:
            facts |= {"lambda_2": self.lambda_2, "lambda_n": self.lambda_n}
        return facts

    def plot(self, ax: Any = None) -> Any:
        """Draw the graph; the steps of a time-varying one in different colours.

        Args:
            ax: a matplotlib Axes. (Default: a new figure's.)
        Returns: the Axes.
        Raises:
            ModuleNotFoundError: if matplotlib is missing; names the extra that brings it.
        """
        _require_matplotlib()
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(figsize=(6.0, 6.0), layout="constrained")[1]
        parts = self._sample()[: graphs.max_drawn_steps()]
        degrees = sorted(set(self.degrees))
        degree = f"{degrees[0]}" if len(degrees) == 1 else f"{degrees[0]} to {degrees[-1]}"
        title = f"{self.name}, n = {self.num_workers}: degree {degree}, spectral gap {self.spectral_gap:.3g}"
        if self.period is None:
            title += f"\nrandom; the first {len(parts)} steps"
        elif len(parts) < self.period:
            title += f"\nsteps 0 to {len(parts) - 1} of a period of {self.period}"
        steps = [(f"step {step}", part.mixing()) for step, part in enumerate(parts)]
        graphs.draw(ax, self.name, self.num_workers, steps, title)
        return ax

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Draw the graph (see :meth:`plot`) into a PNG file, whatever its name ends in.

        Raises:
            ModuleNotFoundError: if matplotlib is missing.
            OSError: if the file can't be written.
        """
        _require_matplotlib()
        from matplotlib.figure import Figure

        # Not pyplot: it would keep the figure and might want a display.
        figure = Figure(figsize=(6.0, 6.2), layout="constrained")
        self.plot(figure.add_subplot())
        with naming(Path(path)):
            figure.savefig(path, format="png", dpi=150)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        return self.num_workers == other.num_workers and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        extra = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
        return f"<Topology {self.name}: {self.num_workers} workers, period {self.period}{extra}>"

    def _worker(self, worker: SupportsIndex) -> int:
        return to_integer("worker", worker, 0, self.num_workers - 1)


class StaticTopology(Topology):
    """The same mixing matrix at every step."""

    def __init__(
        self, name: str, mixing: Mixing, arguments: Mapping[str, Any], trees: tuple[Edges, ...] | None = None
    ) -> None:
        super().__init__(name, mixing.num_workers, arguments, period=1)
        object.__setattr__(self, "_mixing", mixing)
        object.__setattr__(self, "_tree_edges", trees)

    @cached_property
    def _trees(self) -> Trees:
        given: tuple[Edges, ...] | None = self.__dict__["_tree_edges"]
        n = self.num_workers
        if given is None:
            to, frm = edges = graphs.off_diagonal_edges(self.mixing())
            two_way = set(zip(to.tolist(), frm.tolist(), strict=True)) == set(
                zip(frm.tolist(), to.tolist(), strict=True)
            )
            if not two_way or to.size != 2 * (n - 1) or graphs.unreached(n, edges):
                raise ValueError(
                    f"RelaySum needs a tree, but topology {self.name!r} has {to.size} directed links between {n} "
                    f"workers where a tree has {2 * (n - 1)}; topology.spanning_tree(topology) makes one of it"
                )
            given = (edges,)
        return Trees(tuple(Tree(n, edges) for edges in given))

    def trees(self) -> Trees:
        return self._trees

    def at(self, step: SupportsIndex = 0) -> Topology:
        _step(step)
        return self

    def mixing(self, step: SupportsIndex = 0) -> Mixing:
        _step(step)
        mixing: Mixing = self.__dict__["_mixing"]
        return mixing

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether w_ij = w_ji, to 1e-12."""
        mixing = self.mixing()
        to, frm = mixing.rows(), mixing.columns.astype(np.int64)
        back = np.lexsort((to, frm))  # the order in which the transpose's entries are stored
        same_places = np.array_equal(to, frm[back]) and np.array_equal(frm, to[back])
        return bool(same_places and np.all(np.abs(mixing.weights - mixing.weights[back]) <= _SYMMETRY_TOLERANCE))

    @cached_property
    def _eigenvalues(self) -> NDArray[np.float64]:
        if self.mixing().form == "mean":
            return np.asarray(np.eye(1, self.num_workers)[0])  # 1, 0, ..., 0 without rounding
        return np.asarray(np.linalg.eigvalsh(self.matrix())[::-1], dtype=np.float64)

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        if not self.is_symmetric:
            raise ValueError(
                f"eigenvalues, lambda_2 and lambda_n are those of a symmetric matrix, but topology {self.name!r} "
                f"is not symmetric; use spectral_gap"
            )
        return self._eigenvalues.copy()

    @cached_property
    def spectral_gap(self) -> float:
        if self.num_workers == 1:
            return 1.0
        if self.is_symmetric:
            return _gap(max(abs(self.lambda_2), abs(self.lambda_n)))
        return _gap(_distance_from_mean(self.matrix()))

    def _content(self) -> tuple[bytes, ...]:
        return self.mixing().content()

    def _sample(self) -> list[Topology]:
        return [self]

    def __reduce__(self) -> tuple[Any, ...]:
        return (StaticTopology, (self.name, self.mixing(), dict(self.arguments), self.__dict__["_tree_edges"]))


class CyclicTopology(Topology):
    """p >= 2 mixing matrices in turn: step t uses number t mod p."""

    def __init__(self, name: str, cycle: Sequence[Topology], arguments: Mapping[str, Any]) -> None:
        super().__init__(name, cycle[0].num_workers, arguments, period=len(cycle))
        object.__setattr__(self, "_cycle", tuple(cycle))

    def at(self, step: SupportsIndex = 0) -> Topology:
        cycle: tuple[Topology, ...] = self.__dict__["_cycle"]
        return cycle[_step(step) % len(cycle)]

    @cached_property
    def spectral_gap(self) -> float:
        parts = self._sample()
        product = parts[0].matrix()
        for part in parts[1:]:
            product = part.matrix() @ product
        shrunk = _distance_from_mean(product)
        return _gap(0.0 if shrunk <= _EXACT_AVERAGE else shrunk ** (1.0 / len(parts)))

    def _content(self) -> tuple[bytes, ...]:
        return tuple(part for step in self._sample() for part in step._content())

    def _sample(self) -> list[Topology]:
        return list(self.__dict__["_cycle"])

    def __reduce__(self) -> tuple[Any, ...]:
        return (CyclicTopology, (self.name, self.__dict__["_cycle"], dict(self.arguments)))


class RandomMatching(Topology):
    """A fresh random pairing at every step; see :func:`random_matching`."""

    _KEPT = 8  # steps kept by at(): both ends of a process run within a step or two of each other

    def __init__(self, num_workers: int, seed: int) -> None:
        super().__init__("random_matching", num_workers, {"seed": seed}, period=None)
        object.__setattr__(self, "_recent", OrderedDict())

    def at(self, step: SupportsIndex = 0) -> Topology:
        number = _step(step)
        recent: OrderedDict[int, Topology] = self.__dict__["_recent"]
        if number not in recent:
            recent[number] = self._draw(number)
            if len(recent) > self._KEPT:
                recent.popitem(last=False)
        return recent[number]

    def _draw(self, step: int) -> Topology:
        # RandomState, because numpy froze its stream: processes with different numpy versions must pair alike.
        words = [self.arguments["seed"], step & 0xFFFFFFFF, step >> 32]
        order = np.random.RandomState(words).permutation(self.num_workers)
        pairs = order[: self.num_workers // 2 * 2].reshape(-1, 2)
        mixing = graphs.metropolis(self.num_workers, graphs.undirected(self.num_workers, pairs[:, 0], pairs[:, 1]))
        return StaticTopology("random_matching", mixing, {"seed": self.arguments["seed"], "step": step})

    @cached_property
    def is_connected(self) -> bool:
        """True: every pair meets sooner or later."""
        return True

    @cached_property
    def spectral_gap(self) -> float:
        # A matching W is symmetric and W W = W, so E[W^T W] = E[W]: off the diagonal q / (2 (n - 1)), where q is the
        # chance to be paired, and 1 - q / 2 on it. Its second eigenvalue is the difference of the two.
        n = self.num_workers
        if n == 1:
            return 1.0
        paired = (n - n % 2) / n
        return _gap(math.sqrt(max(0.0, 1.0 - paired / 2 - paired / (2 * (n - 1)))))

    def _content(self) -> tuple[bytes, ...]:
        return (b"random_matching", str(self.arguments["seed"]).encode())

    @cached_property
    def _degrees(self) -> tuple[int, ...]:
        return (min(1, self.num_workers - 1),) * self.num_workers

    def _sample(self) -> list[Topology]:
        return [self.at(step) for step in range(4)]

    def __reduce__(self) -> tuple[Any, ...]:
        return (RandomMatching, (self.num_workers, self.arguments["seed"]))


def to_integer(argument: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{argument} must be {expected}, got {number}")
    return number


def _step(step: SupportsIndex) -> int:
    return to_integer("step", step, 0)


def _gap(rho: float) -> float:
    return min(1.0, max(0.0, 1.0 - rho))


def _distance_from_mean(matrix: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(matrix - 1.0 / len(matrix), ord=2))


def unreached(parts: Sequence[Topology]) -> list[int]:
    """Return the workers that worker 0's messages never reach when these are used in turn.

    Doubly stochastic matrices carry as much out of any group of workers as into it; so whoever worker 0 reaches also
    reaches worker 0, and one search from worker 0 decides.
    """
    to, frm = zip(*(graphs.off_diagonal_edges(part.mixing()) for part in parts), strict=True)
    return graphs.unreached(parts[0].num_workers, (np.concatenate(to), np.concatenate(frm)))


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing a topology needs matplotlib, which comes with the extra 'train': pip install 'qgm_ext[train]'"
        ) from error
