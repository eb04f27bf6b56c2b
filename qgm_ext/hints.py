"""What an error says to a name that is not known: the nearest one that is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["check_name", "did_you_mean"]

_ALIKE = 0.5  # difflib's ratio from which a name counts as near


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """``did you mean 'ring'?``, or ``otherwise`` if no known name is near; upper and lower case count as equal.

    Example:
        >>> did_you_mean("Rnig", ["ring", "torus"])
        "did you mean 'ring'?"
        >>> did_you_mean("xyz", ["ring", "torus"], "there are ring, torus")
        'there are ring, torus'
    """
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, 1, cutoff=_ALIKE)
    return f"did you mean {by_lower[near[0]]!r}?" if near else otherwise


def check_name(what: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``known``; suggests the nearest."""
    choices = list(known)
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}{hint and f'; {hint}'}")
