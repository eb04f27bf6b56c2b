"""Argument checks shared by the models."""

from __future__ import annotations

from collections.abc import Sequence


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Raise unless every keyword is an integer >= 1 or a sequence of such."""
    for name, value in sizes.items():
        if isinstance(value, str) or not isinstance(value, int | Sequence):
            raise TypeError(f"{name} must be integers >= 1, got {value!r}")
        for entry in [value] if isinstance(value, int) else value:
            if isinstance(entry, bool) or not isinstance(entry, int):
                raise TypeError(f"{name} must be integers >= 1, got {value!r}")
            if entry < 1:
                raise ValueError(f"{name} must be integers >= 1, got {value!r}")
