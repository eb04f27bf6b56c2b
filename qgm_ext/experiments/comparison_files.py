"""A comparison's forms in a TOML file, in a preset and on disk; what is wrong in them is named.

What a comparison is, and the format of the file, is told in :mod:`qgm_ext.experiments.comparison`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from qgm_ext import topology, topology_names
from qgm_ext.experiments.comparison import Comparison, Method, Published, check_keys
from qgm_ext.experiments.plugins import load_plugins
from qgm_ext.hints import check_name
from qgm_ext.presets import names as preset_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["from_dict", "merge", "preset", "preset_names", "read"]

_MOST_SEEDS = 1000  # a larger number is meant to be one of them


def read(path: Path, **changes: Any) -> Comparison:
    """Read a TOML file.

    Args:
        path: the file; plugins in it that are files stand relative to it.
        **changes: keys of the file that are replaced, e.g. ``alphas``; those of ``train`` one by one.

    Raises:
        ValueError: if it is no TOML, or something in it does not fit; names the file.
        OSError: if it can't be read.
    """
    return _parse(path.read_bytes(), str(path), path.parent, changes)


def preset(name: str, **changes: Any) -> Comparison:
    """A comparison that comes with the package; ``changes`` as in :func:`read`.

    Raises:
        ValueError: if there is none of this name; suggests the nearest.
    """
    check_name("preset", name, preset_names())
    file = resources.files("qgm_ext.presets").joinpath(f"{name}.toml")
    return _parse(file.read_bytes(), f"preset {name}", Path(), changes)


def _parse(content: bytes, where: str, folder: Path, changes: Mapping[str, Any]) -> Comparison:
    try:
        raw = tomllib.loads(content.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not TOML: {error}") from error
    try:
        return from_dict(merge(raw, changes), folder)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def merge(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file with some keys replaced; tables (train, hyper) key by key.

    New ``algorithms`` replace all methods; what the file says of those it knows stays. New ``lrs`` replace all grids.
    Published figures of what the file compares and the changed comparison does not are left out.

    Raises:
        TypeError, ValueError: if a value that is looked at does not fit.
    """
    merged = dict(raw)
    for key, value in changes.items():
        merged[key] = {**_table(key, raw.get(key, {})), **value} if isinstance(value, Mapping) else value
    methods = _tables("method", raw.get("method", []))
    if "algorithms" in changes:
        methods = [method for method in methods if method.get("algorithm") in changes["algorithms"]]
        named = [method["algorithm"] for method in methods]
        merged["algorithms"] = [name for name in changes["algorithms"] if name not in named]
        baseline = raw.get("baseline")
        left = _labels({**merged, "method": methods})
        if "baseline" not in changes and isinstance(baseline, str) and baseline not in left:
            del merged["baseline"]
    if "lrs" in changes:
        methods = [{key: value for key, value in method.items() if key != "lrs"} for method in methods]
    if methods or "method" in raw:
        merged["method"] = methods
    if changes and "published" in raw:
        dropped = [label for label in _labels(raw) if label not in _labels(merged)]
        merged["published"] = [
            table
            for table in _tables("published", raw["published"])
            if (figure := _published(table)).method not in dropped and _is_kept(figure, raw, merged)
        ]
    return merged


def _labels(raw: Mapping[str, Any]) -> list[str]:
    """The labels of all methods."""
    tables = _tables("method", raw.get("method", []))
    return [*_strings("algorithms", raw.get("algorithms", [])), *(t.get("label", t.get("algorithm")) for t in tables)]


def _is_kept(figure: Published, raw: Mapping[str, Any], merged: Mapping[str, Any]) -> bool:
    """Whether what a figure is of is left; raises ValueError if it was not there before either."""
    try:
        figure.check_place(**_grid(merged))
    except ValueError:
        figure.check_place(**_grid(raw))
        return False
    return True


def from_dict(raw: Mapping[str, Any], folder: Path = Path()) -> Comparison:
    """Build a comparison from the content of a TOML file.

    Args:
        raw: the content; see :class:`Comparison`.
        folder: where plugins that are files stand.

    Raises:
        TypeError, ValueError: if a key is unknown or a value does not fit.
    """
    known = {f.name for f in dataclasses.fields(Comparison)} - {"methods"} | {"algorithms", "method", "lrs"}
    check_keys("a comparison", raw, known)
    plain = dict(raw)
    plugins = [_located(plugin, folder) for plugin in _strings("plugins", plain.pop("plugins", []))]
    load_plugins(plugins)
    lrs = _lrs("lrs", plain.pop("lrs")) if "lrs" in plain else ()
    listed = [Method(algorithm=name, lrs=lrs) for name in _strings("algorithms", plain.pop("algorithms", []))]
    tables = [_method(table, lrs) for table in _tables("method", plain.pop("method", []))]
    plain |= _grid(plain)
    if "seeds" in plain:
        plain["seeds"] = _seeds(plain["seeds"])
    for name in ("title", "description", "baseline", "lr_seeds", "choose", "metric"):
        if not isinstance(plain.get(name, ""), str):
            raise TypeError(f"{name} must be a string, got {plain[name]!r}")
    for name in ("train", "hyper"):
        _table(name, plain.get(name, {}))
    plain["hyper"] = _hyper(plain.get("hyper", {}))
    figures = tuple(map(_published, _tables("published", plain.pop("published", []))))
    return Comparison(methods=(*listed, *tables), published=figures, plugins=tuple(plugins), **plain)


def _located(plugin: str, folder: Path) -> str:
    return str((folder / plugin).resolve()) if plugin.endswith(".py") else plugin


def _grid(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Topologies, alphas and models, as :class:`Comparison` has them, and where nothing is said its defaults."""
    parse: dict[str, Callable[[Any], Any]] = {
        "topologies": lambda value: tuple(map(_topology, _strings("topologies", value))),
        "alphas": lambda value: _numbers("alphas", value),
        "models": lambda value: tuple(_strings("models", value)),
    }
    return {name: parse[name](raw[name]) if name in raw else getattr(Comparison, name) for name in parse}


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of strings, got {value!r}")
    return list(value)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
        raise TypeError(f"{name} must be a list of numbers, got {value!r}")
    return tuple(map(float, value))


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a table, got {value!r}")
    return value


def _lrs(name: str, value: Any) -> tuple[float, ...]:
    if not (lrs := _numbers(name, value)):
        raise ValueError(f"{name} must not be empty; leave it out for the usual step sizes")
    return lrs


def _tables(name: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise TypeError(f"{name} must be a list of tables, written [[{name}]], got {value!r}")
    return list(value)


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"seeds must be a number of at least 1 or a list, got {value}")
        if value > _MOST_SEEDS:
            raise ValueError(
                f"seeds is how many there are, at most {_MOST_SEEDS}, or a list, got {value}; one seed is [{value}]"
            )
        return tuple(range(value))
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise TypeError(f"seeds must be a number or a list of integers, got {value!r}")
    return tuple(value)


def _topology(text: str) -> tuple[str, int]:
    """("ring", 16) from "ring:16"."""
    name, workers = topology_names.parse(text, what="topologies")
    if workers is None:
        return name, topology_names.default_workers(name)
    topology.get(name, workers)  # raises where the topology asks something of the number
    return name, workers


def _hyper(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _method(table: Mapping[str, Any], lrs: tuple[float, ...]) -> Method:
    check_keys("a method", table, [f.name for f in dataclasses.fields(Method)])
    if not isinstance(table.get("algorithm"), str):
        raise ValueError(f"a method needs an algorithm, a string; got {dict(table)!r}")
    plain = dict(table)
    where = f"method {plain['algorithm']}"
    plain["lrs"] = _lrs(f"lrs of {where}", plain["lrs"]) if "lrs" in plain else lrs
    for name, wanted, word in (
        ("label", str, "string"),
        ("topology", str, "string"),
        ("hyper", Mapping, "table"),
        ("train", Mapping, "table"),
    ):
        if name in plain and not isinstance(plain[name], wanted):
            raise TypeError(f"{name} of {where} must be a {word}, got {plain[name]!r}")
    plain["hyper"] = _hyper(plain.get("hyper", {}))
    if "topology" in plain:
        plain["topology"] = topology_names.canonical(plain["topology"])
        check_name(f"topology of {where}", plain["topology"].removeprefix(topology.TREE_PREFIX), topology.names())
    return Method(**plain)


def _published(table: Mapping[str, Any]) -> Published:
    check_keys("a published figure", table, [f.name for f in dataclasses.fields(Published)])
    for name in ("method", "value", "topology"):
        if name not in table:
            raise ValueError(f"a published figure needs a {name}, got {dict(table)!r}")
    plain = dict(table)
    for name in ("value", "std", "alpha"):
        number = plain.get(name, 0.0)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise TypeError(f"{name} of a published figure must be a finite number, got {number!r}")
    for name in ("method", "topology", "model", "source", "note"):
        if not isinstance(plain.get(name, ""), str):
            raise TypeError(f"{name} of a published figure must be a string, got {plain[name]!r}")
    if not isinstance(plain.get("verified", True), bool):
        raise TypeError(f"verified of a published figure must be true or false, got {plain['verified']!r}")
    name, workers = _topology(plain["topology"])
    return Published(**{**plain, "topology": f"{name}:{workers}"})
