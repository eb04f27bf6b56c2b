r"""How gossip messages are written when they are not sent as they are: in bfloat16 or int8, with error feedback.

For each message h_i of a pass, with Q the rounding and an error memory e_i, which starts at 0,

.. math::
    c_i = Q(h_i + e_i), \qquad e_i \leftarrow h_i + e_i - c_i, \qquad
    \text{instead of } \sum_j w_{ij} h_j: \quad \sum_j w_{ij} c_j + (h_i - c_i)

c is sent. What a worker's own message lost stays with it, so the workers' mean (push-sum: their sum) is that of exact
messages, and a worker keeps its parameters in full; the memory makes up for what the neighbours did not get. The
workers agree up to the size of the rounding, not exactly.

Here are the formats and the step of n stacked workers; :mod:`qgm_ext.distributed` has equal bits. Compressed
differences, which need more than one pass, are :class:`qgm_ext.algorithms.choco_sgd.ChocoSgd`.

Source: error feedback of Seide et al. 2014 and Karimireddy et al. 2019 (arXiv 1901.09847); the sum with what the own
message lost is CHOCO-Gossip's with gamma = 1 (Koloskova et al. 2019, arXiv 1902.00340).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from qgm_ext import graphs, ops
from qgm_ext.algorithms import Algorithm
from qgm_ext.flat import ALIGNMENT
from qgm_ext.hints import did_you_mean
from qgm_ext.mixing import Mixing

__all__ = [
    "NAMES",
    "BFloat16Format",
    "Int8Format",
    "MessageFormat",
    "make",
    "memories",
    "memory_names",
    "rounded_gossip_step_",
]


class MessageFormat:
    """Writes vectors as bytes and reads them again; a number's bytes depend on its block of 64 numbers alone.

    Attributes:
        name: of the format.
    """

    name: ClassVar[str]

    def nbytes(self, size: int, dtype: torch.dtype) -> int:
        """Bytes of a written vector of ``size`` numbers of ``dtype``, float32 or float64, in whole blocks."""
        raise NotImplementedError

    def message_bytes(self, size: int, itemsize: int) -> int:
        """Bytes of a message of ``size`` numbers of ``itemsize`` bytes, without what fills its last block."""
        raise NotImplementedError

    def write(self, values: Tensor, out: Tensor) -> None:
        """Write a vector.

        Args:
            values: [size], float32 or float64.
            out: [nbytes], uint8, contiguous.
        """
        raise NotImplementedError

    def read(self, packed: Tensor, out: Tensor) -> None:
        """Read a vector that :meth:`write` wrote: [nbytes] uint8, its address a multiple of 8, into [size]."""
        raise NotImplementedError

    def send(self, message: Tensor, error: Tensor, packed: Tensor, lost: Tensor) -> None:
        """Write a message h with error feedback.

        Args:
            message: h, [size]; becomes c, what receivers read.
            error: the memory e, [size]; updated.
            packed: what is to be sent, [nbytes] uint8; written.
            lost: h - c, [size]; written.
        """
        torch.add(message, error, out=lost)
        self.write(lost, packed)
        exact = message.clone()
        self.read(packed, message)
        torch.sub(lost, message, out=error)
        torch.sub(exact, message, out=lost)


class BFloat16Format(MessageFormat):
    """Numbers rounded to bfloat16, 2 bytes each.

    Example:
        >>> made, packed, read = BFloat16Format(), torch.empty(4, dtype=torch.uint8), torch.empty(2)
        >>> made.write(torch.tensor([1.0, 1.001]), packed)
        >>> made.read(packed, read)
        >>> read.tolist()
        [1.0, 1.0]
    """

    name = "bfloat16"

    def nbytes(self, size: int, dtype: torch.dtype) -> int:
        return 2 * size

    def message_bytes(self, size: int, itemsize: int) -> int:
        return 2 * size

    def write(self, values: Tensor, out: Tensor) -> None:
        out.view(torch.bfloat16).copy_(values)

    def read(self, packed: Tensor, out: Tensor) -> None:
        out.copy_(packed.view(torch.bfloat16))


class Int8Format(MessageFormat):
    """Numbers rounded to one of 255 levels between -max|x| and max|x| of their block of 64; a byte each, and the scale
    of the block in the vector's dtype.
    """

    name = "int8"

    def nbytes(self, size: int, dtype: torch.dtype) -> int:
        return -(-size // ALIGNMENT) * (ALIGNMENT + dtype.itemsize)

    def message_bytes(self, size: int, itemsize: int) -> int:
        return size + -(-size // ALIGNMENT) * itemsize

    def write(self, values: Tensor, out: Tensor) -> None:
        scales, levels = self._parts(out, values.dtype)
        blocks = torch.nn.functional.pad(values, (0, levels.numel() - len(values))).view(levels.shape)
        torch.div(blocks.abs().amax(dim=1, keepdim=True), 127, out=scales)
        levels.copy_((blocks / torch.where(scales > 0, scales, 1.0)).round_())

    def read(self, packed: Tensor, out: Tensor) -> None:
        scales, levels = self._parts(packed, out.dtype)
        out.copy_((levels * scales).view(-1)[: len(out)])

    @staticmethod
    def _parts(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The scales, [blocks, 1], which come first, and the levels, [blocks, 64]."""
        end = packed.numel() // (ALIGNMENT + dtype.itemsize) * dtype.itemsize
        return packed[:end].view(dtype)[:, None], packed[end:].view(torch.int8).view(-1, ALIGNMENT)


_FORMATS: dict[str, MessageFormat | None] = {
    "float32": None,
    "bfloat16": BFloat16Format(),
    "int8": Int8Format(),
}
_MEMORY = "message_error"
#: The formats by name; "float32" sends messages as they are, in the dtype that steps compute in.
NAMES: tuple[str, ...] = tuple(_FORMATS)


def make(name: str, algorithms: Sequence[Algorithm]) -> MessageFormat | None:
    """The format of a name, for these algorithms; None if messages are sent as they are.

    Raises:
        ValueError: if there is no such format, or an algorithm can't use it.
    """
    if name not in _FORMATS:
        hint = did_you_mean(name, NAMES)
        raise ValueError(f"message must be one of {', '.join(NAMES)}, got {name!r}{hint and f', {hint}'}")
    made = _FORMATS[name]
    for algorithm in algorithms if made is not None else ():
        if algorithm.rounding_obstacle is not None:
            raise ValueError(f"{algorithm.name} can't send its messages as {name}: {algorithm.rounding_obstacle}")
    return made


def memory_names(algorithm: Algorithm) -> tuple[str, ...]:
    """The state vectors that hold the error memories of an algorithm's messages."""
    if algorithm.messages == 1:
        return (_MEMORY,)
    return tuple(f"{_MEMORY}_{k}" for k in range(algorithm.messages))


def memories(state: Mapping[str, Tensor]) -> list[Tensor]:
    """The error memories among state vectors, message by message."""
    return [vector for name, vector in state.items() if name.startswith(_MEMORY)]


def rounded_gossip_step_(
    x: Tensor,
    g: Tensor,
    state: Sequence[Tensor],
    errors: Sequence[Tensor],
    mixing: Mixing,
    written: MessageFormat,
    rule: str,
    hyper: list[float],
    row_scalars: Tensor | None = None,
    block_sums: Tensor | None = None,
) -> None:
    """:func:`qgm_ext.ops.gossip_step_` with rounded messages, worker by worker: the steps of a process each.

    Args:
        x, g, state, rule, hyper, row_scalars, block_sums: as there.
        errors: the memory of each message, [n, D], like the state.
        mixing: the matrix.
        written: how messages are written.
    """
    n, size = x.shape
    compute = ops.compute_dtype(x.dtype)
    messages = torch.empty(len(errors), n, size, dtype=compute, device=x.device)
    lost, packed = (
        torch.zeros_like(messages),
        torch.empty(written.nbytes(size, compute), dtype=torch.uint8).to(x.device),
    )
    talks = set(torch.from_numpy(np.concatenate(graphs.off_diagonal_edges(mixing))).tolist())
    rows = [None] * n if row_scalars is None else list(row_scalars)
    for i in range(n):
        pieces = [vector[i] for vector in state]
        ops.local_step_(x[i], g[i], pieces, list(messages[:, i]), rule, hyper, rows[i])
        for k in range(len(errors) if i in talks else 0):
            written.send(messages[k, i], errors[k][i], packed, lost[k, i])
    for i in range(n):
        columns, weights = mixing.row(i)
        received = []
        for k in range(len(errors)):
            received += [*(messages[k, j] for j in columns.tolist()), lost[k, i]]
        pieces = [vector[i] for vector in state]
        numbers = (rows[i], None if block_sums is None else block_sums[i])
        ops.merge_(x[i], g[i], pieces, received, [*weights.tolist(), 1.0], False, rule, hyper, *numbers)
