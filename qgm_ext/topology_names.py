"""Topologies as users write them: "ring", "one-peer-exponential", "ring:16". Needs no torch."""

from __future__ import annotations

import inspect

from qgm_ext import topology
from qgm_ext.hints import check_name

__all__ = ["canonical", "default_workers", "parse"]

_DEFAULT_WORKERS = 16


def canonical(name: str) -> str:
    """A topology's name as :func:`qgm_ext.topology.names` spells it; "-" and "_" are the same there."""
    return str(name).strip().lower().replace("-", "_")


def parse(text: str, workers: int | None = None, *, what: str = "topology") -> tuple[str, int | None]:
    """Name and number of workers from NAME or NAME:WORKERS.

    Args:
        text: the one or the other.
        workers: the number, where it is said apart as well.
        what: what the text is called in errors.

    Returns:
        The name as :func:`qgm_ext.topology.names` has it, and the number, None if nothing says it.

    Raises:
        ValueError: if there is no such topology, the number is none, or ``workers`` is another.

    Example:
        >>> parse("ring:16"), parse("one-peer-exponential")
        (('ring', 16), ('one_peer_exponential', None))
    """
    name, colon, count = text.partition(":")
    name = canonical(name)
    check_name(what, name.removeprefix(topology.TREE_PREFIX), topology.names())
    if not colon:
        return name, workers
    if not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise ValueError(f"{what} must be NAME or NAME:WORKERS, e.g. 'ring:16', got {text!r}")
    if workers is not None and workers != int(count):
        raise ValueError(f"{what} {text!r} has {count} workers, and workers is {workers}; say the number once")
    return name, int(count)


def default_workers(name: str) -> int:
    """How many workers a known topology has if nobody says: its own number, where there is only one."""
    known = canonical(name).removeprefix(topology.TREE_PREFIX)
    own = inspect.signature(getattr(topology, known)).parameters["n"].default
    return _DEFAULT_WORKERS if own is inspect.Parameter.empty else int(own)
