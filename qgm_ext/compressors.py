"""Compressors of messages: what a worker sends instead of a vector, and how many bytes that is.

Holds seven compressors with one interface: top-k, random-k, QSGD, scaled sign, bfloat16, int8 and none. They map a
vector to the vector that the receiver unpacks, or pack it to be sent. Error feedback, and which vector is compressed,
is the business of the algorithms that use them. The definitions are those of the authors' codes (epfml/ChocoSGD, copied
in aparna-aketi/neighborhood_gradient_clustering), which apply them to each parameter tensor by itself.

Random numbers come from the caller's generators, one for each row, so that a row's message depends on nothing else:
not on the other rows, the device or what was drawn before (:func:`generator`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qgm_ext import ops
from qgm_ext.hints import did_you_mean

__all__ = [
    "NAMES",
    "BFloat16",
    "Compressed",
    "Compressor",
    "Identity",
    "Int8",
    "Qsgd",
    "RandomK",
    "ScaledSign",
    "TopK",
    "check_seed",
    "generator",
    "make",
]


class Compressed(NamedTuple):
    """Rows that have been compressed.

    Args:
        values: what their receivers unpack, [rows, D].
        data: of each row what is sent, uint8; None where nothing is, or the values themselves.
    """

    values: Tensor
    data: list[Tensor] | None = None


class Compressor:
    """Maps rows of vectors to what their receivers unpack.

    Attributes:
        is_random: whether it draws numbers.
    """

    is_random: ClassVar[bool] = False

    def __call__(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """Compress each row by itself.

        Args:
            values: [rows, d], float32 or float64; not changed.
            generators: one for each row, on the CPU, if ``is_random``.

        Returns:
            What is unpacked, like ``values``; new memory.
        """
        packed = values.clone(memory_format=torch.contiguous_format)
        self.compress_(packed, generators)
        return packed

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        """Compress in place: the arguments of a call, and what it returns is written into ``values``."""
        raise NotImplementedError

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        """Bytes of the message for a vector of ``d`` numbers of ``itemsize`` bytes."""
        raise NotImplementedError

    def packed_bytes(self, d: int, itemsize: int = 4) -> int:
        """Bytes that :meth:`pack` makes of ``d`` numbers: those of the message, but for signs that may be 0."""
        return self.message_bytes(d, itemsize)

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The message itself.

        Args:
            values: [d], float32 or float64, on the CPU.
            generator: if ``is_random``, the sender's.

        Returns:
            [packed_bytes] uint8, of which :meth:`unpack` makes what a call makes of ``values``.
        """
        raise NotImplementedError

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        """Read a message of :meth:`pack` into [d], with a generator like the sender's if ``is_random``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Compressor):
    """Sends the vector itself."""

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        pass

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        return d * itemsize

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _bytes(values)

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        out.copy_(_numbers(packed, out.dtype))


@dataclass(frozen=True)
class _Sparse(Compressor):
    ratio: float = 0.75

    def __post_init__(self) -> None:
        good = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not good or not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio!r}")

    def kept(self, d: int) -> int:
        """How many of ``d`` numbers are kept: max(1, int(d (1 - ratio))) in floating point, as in the authors' code.

        Example:
            >>> TopK(0.9).kept(100), TopK(0.8).kept(35)
            (9, 6)
        """
        return min(d, max(1, int(d * (1 - self.ratio))))


@dataclass(frozen=True)
class TopK(_Sparse):
    """Keeps the largest numbers by magnitude, the first of equal ones; the others are zero.

    Args:
        ratio: share that is left out, in [0, 1).

    Example:
        >>> TopK(0.5)(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).tolist()
        [[0.0, -3.0, 2.0, 0.0]]
    """

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        values.masked_fill_(~self._is_kept(values), 0.0)

    def _is_kept(self, values: Tensor) -> Tensor:
        k = self.kept(values.shape[1])
        sizes = values.abs()
        smallest = sizes.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        kept, ties = ~(sizes <= smallest), sizes == smallest  # NaN is kept
        missing = k - kept.sum(dim=1, keepdim=True)
        if bool((ties.sum(dim=1, keepdim=True) > missing).any()):  # counting is slow, and ties are rare
            ties &= ties.cumsum(dim=1) <= missing
        return kept | ties

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        return self.kept(d) * (itemsize + 4)  # a value and its 32-bit index

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        k = self.kept(len(values))
        index = self._is_kept(values[None])[0].nonzero()[:, 0]
        if len(index) != k:  # more, where there is NaN, which is the largest here
            index = values.abs().topk(k).indices
        return torch.cat([_bytes(values[index]), _bytes(index.to(torch.int32))])

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        end = self.kept(len(out)) * out.element_size()
        index = _numbers(packed[end:], torch.int32).long().clamp_(0, max(0, len(out) - 1))
        out.zero_()[index] = _numbers(packed[:end], out.dtype)


@dataclass(frozen=True)
class RandomK(_Sparse):
    """Keeps numbers at random places; the others are zero.

    Args:
        ratio: share that is left out, in [0, 1).
        unbiased: scale what is kept by d / k, so that the expectation is the vector. The biased form is a contraction.
    """

    is_random: ClassVar[bool] = True

    unbiased: bool = False

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        _check_generators(values, generators)
        d = values.shape[1]
        k = self.kept(d)
        index = torch.stack([torch.randperm(d, generator=source)[:k] for source in generators]).to(values.device)
        kept = values.gather(1, index)
        values.zero_().scatter_(1, index, kept * (d / k) if self.unbiased else kept)

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        return self.kept(d) * itemsize + 8  # the values and the seed of the places

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        assert generator is not None
        d = len(values)
        kept = values[torch.randperm(d, generator=generator)[: self.kept(d)]]
        seed = torch.tensor([generator.initial_seed()])
        return torch.cat([_bytes(kept * (d / self.kept(d)) if self.unbiased else kept), _bytes(seed)])

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        assert generator is not None
        if int(_numbers(packed[-8:], torch.int64)) != generator.initial_seed():
            raise ValueError("a message of random_k has places drawn from another seed than was agreed on")
        d = len(out)
        index = torch.randperm(d, generator=generator)[: self.kept(d)]
        out.zero_()[index] = _numbers(packed[:-8], out.dtype)


@dataclass(frozen=True)
class Qsgd(Compressor):
    r"""Rounds magnitudes at random to one of s + 1 levels of the row's 2-norm, s = 2^bits - 1, and keeps the signs.

    .. math::
        Q(x) = \|x\|_2 \operatorname{sign}(x) \frac{\xi}{s}, \qquad
        \xi = \lfloor s |x| / \|x\|_2 \rfloor + \mathrm{Bernoulli}(\text{the fraction left})

    Its expectation is x. The biased form is Q / (1 + min(d / s^2, sqrt(d) / s)), a contraction.

    Args:
        bits: of the magnitude, 1 to 16; the sign takes one more.
        unbiased: leave out the division.

    Source: Alistarh et al., "QSGD" (NeurIPS 2017, arXiv 1610.02132); the division as in epfml/ChocoSGD.
    """

    is_random: ClassVar[bool] = True

    bits: int = 7
    unbiased: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 16:
            raise ValueError(f"bits must be an integer from 1 to 16, got {self.bits!r}")

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        level, norms = self._levels(values, generators)
        self._scale(values.sign_().mul_(level), norms)

    def _levels(self, values: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The level of each number, and the norms of the rows, [rows, 1]."""
        _check_generators(values, generators)
        levels = 2**self.bits - 1
        norms = ops.squared_norms(values).sqrt().to(values.dtype)[:, None]
        scaled = torch.where(norms > 0, values.abs() / (norms / levels), 0.0)
        draws = torch.stack([torch.rand(values.shape[1], generator=one, dtype=values.dtype) for one in generators])
        floor = scaled.floor()
        return (floor + (draws.to(values.device) < scaled - floor)).clamp_(max=levels), norms

    def _scale(self, signed: Tensor, norms: Tensor) -> None:
        """Make numbers of signed levels, in place."""
        d, levels = signed.shape[1], 2**self.bits - 1
        shrink = 1.0 if self.unbiased else 1.0 / (1.0 + min(d / levels**2, math.sqrt(d) / levels))
        signed.mul_(norms / levels).mul_(shrink)

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        return -(-d * (self.bits + 1) // 8) + itemsize  # signs and levels, and the norm

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        assert generator is not None
        level, norms = self._levels(values[None], [generator])
        codes = level[0].nan_to_num_(0.0).to(torch.int64) + (values < 0).to(torch.int64) * 2**self.bits
        return torch.cat([_bytes(norms[0]), _pack_bits(codes, self.bits + 1)])

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        assert generator is not None
        torch.rand(len(out), generator=generator, dtype=out.dtype)  # leaves the generator where the sender's is
        norm = _numbers(packed[: out.element_size()], out.dtype)
        codes = _unpack_bits(packed[out.element_size() :], self.bits + 1, len(out))
        level, negative = codes % 2**self.bits, codes >= 2**self.bits
        out.copy_(level).mul_(1.0 - 2.0 * negative.to(out.dtype))
        self._scale(out[None], norm[None])


@dataclass(frozen=True)
class ScaledSign(Compressor):
    """The signs, times the mean magnitude of the row: sign(x) ||x||_1 / d. A contraction.

    Args:
        sign_of_zero: 0, as CompNGC's code has it, or 1, as ChocoSGD's, whose message is exactly one bit a number.
    """

    sign_of_zero: int = 0

    def __post_init__(self) -> None:
        if self.sign_of_zero not in (0, 1) or isinstance(self.sign_of_zero, bool):
            raise ValueError(f"sign_of_zero must be 0 or 1, got {self.sign_of_zero!r}")

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        scale = _mean_magnitudes(values)
        if self.sign_of_zero == 0:
            values.sign_().mul_(scale)
        else:
            values.ge_(0).mul_(2 * scale).sub_(scale)  # exactly scale or -scale

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        return -(-d // 8) + itemsize  # one bit a number (zeros are rare) and the scale

    def packed_bytes(self, d: int, itemsize: int = 4) -> int:
        return -(-d * self._bits // 8) + itemsize

    @property
    def _bits(self) -> int:
        return 2 - self.sign_of_zero  # a sign that may be 0 takes two

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        scale = _mean_magnitudes(values[None])[0]
        codes = (values >= 0).to(torch.int64)
        if self.sign_of_zero == 0:
            codes += (values > 0).to(torch.int64)
        return torch.cat([_bytes(scale), _pack_bits(codes, self._bits)])

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        scale = _numbers(packed[: out.element_size()], out.dtype)
        out.copy_(_unpack_bits(packed[out.element_size() :], self._bits, len(out)))
        if self.sign_of_zero == 0:
            out.sub_(1).mul_(scale)
        else:
            out.mul_(2 * scale).sub_(scale)


@dataclass(frozen=True)
class BFloat16(Compressor):
    """Rounds each number to bfloat16."""

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        values.copy_(values.to(torch.bfloat16))

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        return 2 * d

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _bytes(values.to(torch.bfloat16))

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        out.copy_(_numbers(packed, torch.bfloat16))


@dataclass(frozen=True)
class Int8(Compressor):
    """Rounds each number to one of 255 levels between -max|x| and max|x| of the row.

    Example:
        >>> Int8()(torch.tensor([[127.0, 63.6, -0.4]])).tolist()
        [[127.0, 64.0, -0.0]]
    """

    def compress_(self, values: Tensor, generators: Sequence[torch.Generator] = ()) -> None:
        values.mul_(self._round_(values))

    @staticmethod
    def _round_(values: Tensor) -> Tensor:
        """Make levels of the numbers of each row, in place; returns the scales, [rows, 1]."""
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        values.div_(torch.where(scale > 0, scale, 1.0)).round_()
        return scale

    def message_bytes(self, d: int, itemsize: int = 4) -> int:
        return d + itemsize  # a byte a number and the scale

    def pack(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        levels = values[None].clone()
        scale = self._round_(levels)
        return torch.cat([_bytes(scale), _bytes(levels.to(torch.int8))])

    def unpack(self, packed: Tensor, out: Tensor, generator: torch.Generator | None = None) -> None:
        end = out.element_size()
        out.copy_(_numbers(packed[end:], torch.int8)).mul_(_numbers(packed[:end], out.dtype))


NAMES: tuple[str, ...] = ("bfloat16", "int8", "none", "qsgd", "random_k", "sign", "top_k")


def make(name: str, *, ratio: float = 0.75, bits: int = 7) -> Compressor:
    """Build the biased (contracting) form of a compressor, which error feedback and CHOCO take.

    Args:
        name: one of NAMES.
        ratio: of top_k and random_k. bits: of qsgd.

    Raises:
        ValueError: if the name is not known or a value is outside its range, used or not.
    """
    known = {
        "bfloat16": BFloat16(),
        "int8": Int8(),
        "none": Identity(),
        "qsgd": Qsgd(bits),
        "random_k": RandomK(ratio),
        "sign": ScaledSign(),
        "top_k": TopK(ratio),
    }
    if name not in known:
        hint = did_you_mean(name, known, f"there are {', '.join(NAMES)}")
        raise ValueError(f"compressor {name!r} is not known, {hint}")
    return known[name]


def generator(*key: int) -> torch.Generator:
    """A generator that is a function of its key, such as (seed, step, worker).

    Example:
        >>> int(generator(0, 1).initial_seed() == generator(0, 1).initial_seed())
        1
    """
    source = torch.Generator(device="cpu")
    source.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return source


def _mean_magnitudes(values: Tensor) -> Tensor:
    """||x||_1 / d of each row, [rows, 1], summed in the order of :func:`qgm_ext.ops.squared_norms`, element-wise.

    torch.mean sums in an order that depends on threads, processor and device.
    """
    rows, d = values.shape
    blocks, lanes = -(-d // ops.REDUCE_BLOCK), 256
    sums = values.new_zeros(rows, blocks * ops.REDUCE_BLOCK)
    torch.abs(values, out=sums[:, :d])
    parts = sums.view(rows, blocks, -1, lanes)
    total = parts[:, :, 0]
    for k in range(1, parts.shape[2]):
        total += parts[:, :, k]
    while lanes > 1:
        lanes //= 2
        total = total[..., :lanes] + total[..., lanes:]
    means = [sum(row) / d for row in total[..., 0].double().tolist()]
    return values.new_tensor(means)[:, None]


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(-1).view(torch.uint8)


def _numbers(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.clone().view(dtype)  # a slice of bytes may begin anywhere, numbers may not


def _pack_bits(codes: Tensor, width: int) -> Tensor:
    """Integers below 2^width as so many bits each, one after the other."""
    octets = codes.numpy().astype(">u4").view(np.uint8).reshape(-1, 4)
    return torch.from_numpy(np.packbits(np.unpackbits(octets, axis=1)[:, 32 - width :]))


def _unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=count * width).reshape(count, width)
    octets = np.packbits(np.pad(bits, ((0, 0), (32 - width, 0))), axis=1)
    return torch.from_numpy(octets.view(">u4")[:, 0].astype(np.int64))


def _check_generators(values: Tensor, generators: Sequence[torch.Generator]) -> None:
    if len(generators) != len(values):
        raise ValueError(f"generators must be one for each of the {len(values)} rows, got {len(generators)}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless ``seed`` is an integer of at least 0."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
