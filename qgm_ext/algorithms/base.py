"""What an algorithm is to the rest of the package: hyper-parameters, state, and the compiled rule that steps it.

The arithmetic is in csrc/rules (and, to be read, in :mod:`qgm_ext.reference`); this file holds the contract and the
registry, not an algorithm.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar


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
        needs_simulator: whether a step takes more than the gradient at x (cross-gradients, features, a second
            gradient), which only :class:`qgm_ext.Simulator` can compute; see
            :class:`qgm_ext.algorithms.cross_gradient.CrossGradientAlgorithm`.

    Raises:
        ValueError: if a hyper-parameter is outside its range, not finite, or not a number.
    """

    name: ClassVar[str]
    messages: ClassVar[int] = 1
    source: ClassVar[str]
    needs_simulator: ClassVar[bool] = False

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
        """The state vectors in the order of the rule, each of the model's size, zero at the start."""
        raise NotImplementedError

    def hyper(self, step: int, lr: float) -> list[float]:
        """The rule's hyper-parameters in step number ``step`` (from 0) with step size ``lr``."""
        raise NotImplementedError

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
        near = difflib.get_close_matches(str(name), _registry, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
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
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(fields)}"
            raise TypeError(f"{name} has no hyper-parameter {key!r}, {hint}")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in hyper]
    if missing:
        raise TypeError(f"{name} needs {', '.join(missing)}")
    return cls(**hyper)
