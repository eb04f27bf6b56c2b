r"""What decentralized training on many machines would cost: step time, memory, bytes and mixing, before renting them.

The model, for n workers with D parameters, a link of B bit/s each way for each worker and a one-way delay of L seconds:

- A worker that exchanges with d neighbours sends and receives d messages of M bytes at once, so that

  .. math:: t_{gossip} = 2 L + 8 d M / (0.957 B), \qquad
            t_{all-reduce} = 4 (n - 1) L + 2 \frac{n - 1}{n} 8 M / (0.957 B)

  with the largest d of any worker, for the slowest one sets the pace, averaged over the period of time-varying graphs.
  The delay counts twice for each message, because Gloo sends it only when the receiver has said that it is ready.
  0.957 is the share of payload in Ethernet frames of 1500 bytes; all-reduce is the ring of Gloo and NCCL. A step is
  that plus the time of the gradient, since both run one after the other.
- Messages in bfloat16 and int8 are those of :mod:`qgm_ext.messages`, which any algorithm can send; the other formats
  are CHOCO-SGD's compressors.
- Memory: parameters, gradient, the algorithm's state and the error memory of rounded messages in float32, one message
  to send and d received.
- Mixing is 1 - rho, the spectral gap of :attr:`qgm_ext.topology.Topology.spectral_gap`: closed forms where there are
  some, else sparse eigenvalues. For a compressor that keeps the share delta of a message's energy, delta times the gap
  is shown: a rough guide between the gap of exact messages and gap^2 delta / 82, which is all that is proven of CHOCO
  (Koloskova et al., ICML 2019). Such messages are listed and never recommended. delta is k/d for top-k and random-k,
  2/pi for signs of Gaussian numbers, 1/(1 + min(d/s^2, sqrt(d)/s)) for QSGD with d = 10^6 numbers in a tensor, and 1
  for bfloat16 and int8.

Not in the model: packet loss, TCP finding its pace, several processes on a machine, stragglers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qgm_ext import algorithms, compressors, graphs, messages
from qgm_ext import topology as topologies
from qgm_ext.topology import Topology

__all__ = ["ALL_REDUCE", "MESSAGES", "Choice", "Network", "Plan", "make", "mixing_rate", "steps_of"]

ALL_REDUCE = "all-reduce"
MESSAGES = ("float32", *(name for name in compressors.NAMES if name != "none"))

_FAITHFUL = ("float32", "bfloat16")  # what is recommended: whether int8 is enough is to be tried first
_PAYLOAD = 1448 / 1514  # of a full frame, headers of Ethernet, IP and TCP with timestamps
_TRIPS = 2  # of a message: the receiver's word that it is ready, and the message
_TENSOR = 10**6  # numbers in a parameter tensor, of which QSGD's delta depends
_LARGEST_GRAPH = 4096  # workers up to which random graphs, whose edges are drawn pair by pair, are built
_DENSE = 512  # workers up to which dense eigenvalues are taken
_COMPRESSED = "choco_sgd"


@dataclass(frozen=True)
class Network:
    """The machines.

    Args:
        workers: n >= 1.
        bandwidth: of each worker's link, each way, in bit/s, > 0.
        latency: one way between two workers, in seconds, >= 0.
        compute: seconds of one gradient, >= 0.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named.
    """

    workers: int
    bandwidth: float
    latency: float
    compute: float = 0.0

    def __post_init__(self) -> None:
        _check_count("workers", self.workers)
        algorithms.check_number("bandwidth", self.bandwidth, low=0.0)
        if self.bandwidth == 0:
            raise ValueError("bandwidth must be a finite number > 0, got 0")
        algorithms.check_number("latency", self.latency, low=0.0)
        algorithms.check_number("compute", self.compute, low=0.0)

    def gossip_seconds(self, degree: int, message_bytes: float) -> float:
        """Time to exchange messages with ``degree`` neighbours.

        Example:
            >>> round(Network(8, 100e6, 0.05).gossip_seconds(1, 1e6), 3)
            0.184
        """
        return 0.0 if degree == 0 else _TRIPS * self.latency + degree * self._seconds(message_bytes)

    def all_reduce_seconds(self, message_bytes: float) -> float:
        """Time of a ring all-reduce."""
        rounds = 2 * (self.workers - 1)
        return rounds * (_TRIPS * self.latency + self._seconds(message_bytes / self.workers))

    def _seconds(self, message_bytes: float) -> float:
        return 8 * message_bytes / (_PAYLOAD * self.bandwidth)


@dataclass(frozen=True)
class Choice:
    """One way to train.

    Args:
        topology: a name of :func:`qgm_ext.topology.names`, or ALL_REDUCE.
        message: one of MESSAGES.
        seconds: of a step.
        bytes_mean, bytes_max: that a worker sends in a step, on the mean and at most.
        memory: bytes of a worker, at most.
        mixing: in [0, 1]: by how much a step brings the workers closer; 1 is exact averaging. None: not known.
        runs_with: which algorithm can do it; None if none can.
    """

    topology: str
    message: str
    seconds: float
    bytes_mean: float
    bytes_max: float
    memory: float
    mixing: float | None
    runs_with: str | None


@dataclass(frozen=True)
class Plan:
    """All choices, the fastest first, and the one to take.

    Args:
        choices: by seconds.
        recommended: the fastest that an algorithm can do, with messages in float32 or bfloat16, and that mixes by at
            least ``least_mixing``; if none does, the one that mixes best.
        least_mixing: what was asked for.
        notes: topologies that are left out, and why.
    """

    choices: list[Choice]
    recommended: Choice
    least_mixing: float
    notes: list[str]


def make(parameters: int, network: Network, algorithm: str = "qg_dsgdm_n", least_mixing: float = 0.1) -> Plan:
    """Predict every topology with every type of message, and all-reduce.

    Args:
        parameters: D >= 1.
        network: the machines.
        algorithm: whose state takes memory.
        least_mixing: in [0, 1], what the recommended choice must reach.

    Raises:
        TypeError, ValueError: if an argument does not fit; it is named.

    Example:
        >>> best = make(10**6, Network(64, 1e8, 0.001)).recommended
        >>> best.topology, best.message, best.mixing
        ('one_peer_exponential', 'bfloat16', 1.0)
    """
    _check_count("parameters", parameters)
    algorithms.check_number("least_mixing", least_mixing, low=0.0, high=1.0)
    n, notes, choices = network.workers, [], []
    own = _state_vectors(algorithm, n)
    choices += [
        _choice(network, parameters, ALL_REDUCE, message, [], 1.0, own)
        for message in ("float32", "bfloat16")  # the others can't be summed on the way
    ]
    for name in topologies.names():
        try:
            steps, gap = steps_of(name, n), mixing_rate(name, n)
        except ValueError as error:
            notes.append(f"{name}: {error}")
            continue
        choices += [_choice(network, parameters, name, message, steps, gap, own) for message in MESSAGES]
    # Nine digits, so that rounding does not decide between equal times.
    choices.sort(key=lambda c: (float(f"{c.seconds:.9g}"), -(c.mixing or 0.0), c.memory, c.topology))
    possible = [c for c in choices if c.runs_with is not None and c.mixing is not None and c.message in _FAITHFUL]
    good = [c for c in possible if (c.mixing or 0.0) >= least_mixing]
    best = good[0] if good else max(possible, key=lambda c: (c.mixing or 0.0, -c.seconds))
    return Plan(choices, best, least_mixing, notes)


def _choice(
    network: Network,
    parameters: int,
    topology: str,
    message: str,
    steps: list[tuple[int, float]],
    gap: float | None,
    own: int,
) -> Choice:
    size, vector = _message_bytes(message, parameters), 4.0 * parameters
    if topology == ALL_REDUCE:
        n = network.workers
        sent = 2 * (n - 1) / n * size
        seconds = network.compute + network.all_reduce_seconds(size)
        runs = "DistributedDataParallel"
        # Parameters, gradient and momentum, and DDP's buckets.
        return Choice(topology, message, seconds, sent, sent, 4 * vector, 1.0, runs)
    seconds = network.compute + sum(network.gossip_seconds(most, size) for most, _ in steps) / len(steps)
    mean = sum(average for _, average in steps) / len(steps) * size
    most = max(most for most, _ in steps)
    compressed = message not in messages.NAMES
    runs_with: str | None = "any algorithm"
    if topology == "random_directed":
        runs_with = None if compressed else "sgp, qg_sgp"
    elif compressed:
        runs_with = _COMPRESSED if len(steps) == 1 and topology not in _DIRECTED_OR_RANDOM else None
    vectors = _state_vectors(_COMPRESSED, network.workers) if runs_with == _COMPRESSED else own
    memories = 0 if compressed or message == "float32" else 1
    memory = (2 + vectors + memories) * vector + size * (1 + most)
    mixing = None if gap is None else gap * _kept(message)
    return Choice(topology, message, seconds, mean, most * size, memory, mixing, runs_with)


def _message_bytes(message: str, parameters: int) -> float:
    if message in messages.NAMES:
        written = messages.make(message, [])
        return float(4 * parameters if written is None else written.message_bytes(parameters, 4))
    return float(compressors.make(message).message_bytes(parameters))


def _kept(message: str) -> float:
    """Delta: the share of a message's energy that its compressor keeps."""
    made = compressors.make("none" if message == "float32" else message)
    if isinstance(made, (compressors.TopK, compressors.RandomK)):
        return float(made.kept(_TENSOR) / _TENSOR)
    if isinstance(made, compressors.ScaledSign):
        return 2 / math.pi
    if isinstance(made, compressors.Qsgd):
        levels = float((1 << made.bits) - 1)
        return 1.0 / (1.0 + min(_TENSOR / levels**2, math.sqrt(_TENSOR) / levels))
    return 1.0


def _state_vectors(algorithm: str, workers: int) -> int:
    return len(algorithms.get(algorithm, lr=0.1).state_names)


# Topologies -----------------------------------------------------------------------------------------------------------

_DIRECTED_OR_RANDOM = ("exponential", "one_peer_exponential", "random_matching", "random_directed")


def steps_of(name: str, n: int) -> list[tuple[int, float]]:
    """The most and the mean number of messages that a worker sends or receives, for each step of the period.

    Large graphs are counted by formula; a test compares with the graphs themselves.

    Raises:
        ValueError: if there is no such topology of n workers.
    """
    if n == 1 and name != "social":
        return [(0, 0.0)]
    count = _DEGREES.get(name)
    if count is not None:
        return [count(n)]
    if name == "one_peer_exponential":
        return [(1, 1.0)] * len(graphs.exponential_hops(n))
    if name == "random_matching":
        return [(1, (n - n % 2) / n)]
    return [_count(_graph(name, n))]


def _count(topology: Topology) -> tuple[int, float]:
    to, frm = graphs.off_diagonal_edges(topology.mixing())
    n = topology.num_workers
    most = max(int(np.bincount(ends, minlength=n).max()) for ends in (to, frm))
    return most, len(to) / n


def _torus_degree(n: int) -> tuple[int, float]:
    degree = sum(min(side - 1, 2) for side in graphs.torus_shape(n))
    return degree, float(degree)


def _hypercube_degree(n: int) -> tuple[int, float]:
    if n & (n - 1):
        raise ValueError(f"n must be a power of two, got {n}")
    return n.bit_length() - 1, float(n.bit_length() - 1)


_DEGREES: dict[str, Callable[[int], tuple[int, float]]] = {
    "ring": lambda n: (min(2, n - 1), float(min(2, n - 1))),
    "chain": lambda n: (min(2, n - 1), 2 * (n - 1) / n),
    "star": lambda n: (n - 1, 2 * (n - 1) / n),
    "complete": lambda n: (n - 1, float(n - 1)),
    "torus": _torus_degree,
    "hypercube": _hypercube_degree,
    "exponential": lambda n: (len(graphs.exponential_hops(n)), float(len(graphs.exponential_hops(n)))),
}


def mixing_rate(name: str, n: int) -> float | None:
    """The spectral gap of a named topology of n workers; None for push-sum's graphs, whose rows don't sum to one.

    Raises:
        ValueError: if there is no such topology of n workers.

    Example:
        >>> round(mixing_rate("ring", 16), 4), mixing_rate("one_peer_exponential", 1024)
        (0.0507, 1.0)
    """
    if name == "random_directed":
        return None
    if n == 1 and name != "social":
        return 1.0
    if name in _GAPS:
        return min(1.0, max(0.0, _GAPS[name](n)))
    made = _graph(name, n)
    return _sparse_gap(made) if made.num_workers > _DENSE and made.is_symmetric else made.spectral_gap


def _graph(name: str, n: int) -> Topology:
    if name in ("erdos_renyi", "random_directed") and n > _LARGEST_GRAPH:
        raise ValueError(f"n must be at most {_LARGEST_GRAPH} for a random graph here, got {n}")
    return topologies.get(name, n)


def _sparse_gap(topology: Topology) -> float:
    """1 - max(|lambda_2|, |lambda_n|) of a large symmetric matrix, by Lanczos on W - J."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = topology.num_workers
    weights = _sparse(topology)

    def apply(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = vector.ravel()
        product: NDArray[np.float64] = weights @ flat - flat.mean()
        return product

    operator = LinearOperator((n, n), matvec=apply, dtype=np.float64)
    start = np.random.RandomState(0).standard_normal(n)  # a start of its own would be drawn anew in every call
    # Eigenvalues next to one are close together: a wide basis, or Lanczos does not converge.
    largest = eigsh(operator, k=1, which="LM", v0=start, ncv=min(n, 128), maxiter=100 * n, return_eigenvectors=False)
    return 1.0 - float(abs(largest[0]))


def _sparse(topology: Topology) -> NDArray[np.float64]:
    from scipy.sparse import csr_matrix

    n, mixing = topology.num_workers, topology.mixing()
    rows = [mixing.row(i) for i in range(n)]
    columns = np.concatenate([columns for columns, _ in rows])
    weights = np.concatenate([weights for _, weights in rows])
    starts = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    matrix: NDArray[np.float64] = csr_matrix((weights, columns, starts), shape=(n, n))
    return matrix


def _angles(n: int) -> NDArray[np.float64]:
    """2 pi k / n of the Fourier modes that are not the mean."""
    return 2 * np.pi * np.arange(1, n) / n


def _chain_gap(n: int) -> float:
    weight = 1 / 3 if n > 2 else 1 / 2
    modes = 1 - 2 * weight * (1 - np.cos(np.pi * np.arange(1, n) / n))
    return 1.0 - float(np.abs(modes).max())


def _ring_gap(n: int) -> float:
    return _chain_gap(2) if n == 2 else 1.0 - float(np.abs((1 + 2 * np.cos(_angles(n))) / 3).max())


def _torus_gap(n: int) -> float:
    # A side of one adds nothing, a side of two one edge, a longer one two.
    sums, degree = np.zeros(1), 0
    for side in graphs.torus_shape(n):
        edges = min(side - 1, 2)
        sums = np.add.outer(sums, edges * np.cos(2 * np.pi * np.arange(side) / side)).ravel()
        degree += edges
    return 1.0 - float(np.abs((1 + sums[1:]) / (1 + degree)).max())


def _exponential_gap(n: int) -> float:
    hops = graphs.exponential_hops(n)
    modes = sum((np.exp(1j * hop * _angles(n)) for hop in hops), start=np.ones(n - 1, dtype=np.complex128))
    return 1.0 - float(np.abs(modes / (len(hops) + 1)).max())


def _one_peer_gap(n: int) -> float:
    """Of the product over a period: the matrices are circulant, so their modes multiply."""
    hops, k = graphs.exponential_hops(n), np.arange(1, n)
    turns = [hop * k % n for hop in hops]  # in integers: large angles lose the digits that make a half turn exact
    factors = [np.where(2 * turn == n, 0.0, np.abs(np.cos(np.pi * turn / n))) for turn in turns]
    rho = float(np.prod(factors, axis=0).max())
    return 1.0 if rho < 1e-12 else 1.0 - rho ** (1 / len(hops))  # n a power of two: exact averaging


def _matching_gap(n: int) -> float:
    # E[W^T W] = E[W], for a matching averages twice as it does once; a pair is matched with probability 1/n or 1/(n-1).
    pair = 1 / (n - 1) if n % 2 == 0 else 1 / n
    return 1.0 - math.sqrt(max(0.0, 1.0 - n * pair / 2))


_GAPS: dict[str, Callable[[int], float]] = {
    "ring": _ring_gap,
    "chain": _chain_gap,
    "star": lambda n: 1.0 if n == 2 else 1 / n,
    "complete": lambda n: 1.0,
    "torus": _torus_gap,
    "hypercube": lambda n: 2 / (_hypercube_degree(n)[0] + 1),
    "exponential": _exponential_gap,
    "one_peer_exponential": _one_peer_gap,
    "random_matching": _matching_gap,
}


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
