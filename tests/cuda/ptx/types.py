"""PTX types as numpy types.

A register is stored as unsigned bits of its width; an instruction looks at these bits through its own type. bfloat16
has no numpy type, so its bits stay uint16 and ``floats`` converts them. Holds no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
WIDE_BITS = np.dtype("V16")  # 128-bit registers: only loaded, stored, moved, never computed with


@dataclass(frozen=True)
class PtxType:
    """One scalar PTX type.

    Attributes:
        name: without the dot, such as ``f32``.
        dtype: numpy type that the instruction computes in (uint16 for bf16, uint32 for packed pairs).
        size: bytes.
        kind: ``b`` bits, ``u`` unsigned, ``s`` signed, ``f`` IEEE float, ``x`` bfloat16 or packed, ``p`` predicate.
    """

    name: str
    dtype: np.dtype[Any]
    size: int
    kind: str

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned numpy type of the same width, as registers store it."""
        if self.kind == "p":
            return self.dtype
        return WIDE_BITS if self.size == 16 else np.dtype(f"u{self.size}")

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_signed(self) -> bool:
        return self.kind == "s"


def _table() -> dict[str, PtxType]:
    types = [PtxType("pred", np.dtype(np.bool_), 1, "p"), PtxType("b128", WIDE_BITS, 16, "b")]
    for size in (1, 2, 4, 8):
        for kind in "bus":
            types.append(PtxType(f"{kind}{8 * size}", np.dtype(f"{'i' if kind == 's' else 'u'}{size}"), size, kind))
    for size in (2, 4, 8):
        types.append(PtxType(f"f{8 * size}", np.dtype(f"f{size}"), size, "f"))
    types.append(PtxType("bf16", np.dtype(np.uint16), 2, "x"))
    types.append(PtxType("f16x2", np.dtype(np.uint32), 4, "x"))
    types.append(PtxType("bf16x2", np.dtype(np.uint32), 4, "x"))
    return {t.name: t for t in types}


TYPES: dict[str, PtxType] = _table()

#: Sets of type names that instructions accept.
UNSIGNED = frozenset({"u16", "u32", "u64"})
SIGNED = frozenset({"s16", "s32", "s64"})
INTEGERS = UNSIGNED | SIGNED
BITS = frozenset({"b16", "b32", "b64"})
FLOATS = frozenset({"f32", "f64"})
MEMORY_TYPES = frozenset(TYPES) - {"pred", "f16x2", "bf16x2"}
