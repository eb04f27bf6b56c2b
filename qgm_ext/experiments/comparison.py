"""Comparison: which methods are compared on what, checked, and its forms in a TOML file, in a preset and on disk.

A comparison is a grid: models x topologies x alphas make cells, in each cell every method is trained with every step
size of its grid and every seed. It holds no training (:mod:`qgm_ext.experiments.compare`) and no results
(:mod:`qgm_ext.experiments.results`). The format of the TOML file is told in :class:`Comparison`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qgm_ext import algorithms, data, models, topology
from qgm_ext.algorithms import check_number
from qgm_ext.experiments.config import TrainConfig, canonical_topology, check_name, default_workers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Cell", "Comparison", "Method", "Published", "load_plugins", "preset", "preset_names", "read"]

FORMAT = "qgm_ext.compare/1"

Choose = Literal["last", "best"]
LrSeeds = Literal["all", "first"]

# Fields of TrainConfig that the grid decides, with the key of the file that does.
_DECIDED = {
    "algorithm": "algorithms",
    "hyper": "[hyper] or a method's hyper",
    "topology": "topologies",
    "workers": "topologies, e.g. 'ring:16'",
    "alpha": "alphas",
    "model": "models",
    "lr": "lrs",
    "seed": "seeds",
    "threads": "--threads",
}
_TRAIN_FIELDS = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name not in _DECIDED)
_DEFAULT_VALIDATION = 0.1
_DEFAULT_FACTORS = (0.25, 0.5, 1.0, 2.0)  # of an algorithm's own step size, where nobody gives a grid


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Args:
        algorithm: a name from :func:`qgm_ext.algorithms.names`.
        label: what the table calls it, unique. (Default: the algorithm's name.)
        lrs: its step sizes. (Default: the comparison's, else the algorithm's own times 1/4, 1/2, 1 and 2.)
        hyper: hyper-parameters that differ from the comparison's.
        topology: runs on this one instead of the cell's, with as many workers.
        train: other fields of TrainConfig that differ from the comparison's.
    """

    algorithm: str
    label: str = ""
    lrs: tuple[float, ...] = ()
    hyper: Mapping[str, Any] = field(default_factory=dict)
    topology: str | None = None
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure from a paper, shown beside one's own.

    Args:
        method: label of a method of the comparison, or any other name: then it is a row without own figures.
        value: accuracy in percent.
        topology: as in the comparison, "ring:16".
        alpha: the heterogeneity it belongs to; None: all.
        model: a model of the comparison; None: all.
        std: standard deviation in percent, if it was given.
        verified: False: taken from memory or from a text that could not be compared with its source.
        source: paper and table.
        note: what differs.
    """

    method: str
    value: float
    topology: str
    alpha: float | None = None
    model: str | None = None
    std: float | None = None
    verified: bool = True
    source: str = ""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One place of the table: a method on one model, topology and alpha.

    Args:
        model, alpha: as the comparison has them; alpha is None for partitions without it.
        topology, workers: as the comparison has them; what the method runs on may differ, see ``config``.
        method: the method.
    """

    model: str
    topology: str
    workers: int
    alpha: float | None
    method: Method

    @property
    def place(self) -> tuple[str, str, float | None]:
        """Model, "topology:workers" and alpha: the cells of all methods with the same place are compared."""
        return self.model, f"{self.topology}:{self.workers}", self.alpha

    def __str__(self) -> str:
        alpha = "" if self.alpha is None else f", alpha {self.alpha:g}"
        return f"{self.method.label} on {self.topology}:{self.workers}{alpha}, {self.model}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A grid of training runs, complete and checked.

    In a TOML file::

        title = "Fashion-MNIST, ring of 16"
        algorithms = ["dsgd", "qg_dsgdm_n"]     # or [[method]] tables, or both
        topologies = ["ring:16", "social"]      # name:workers; workers may be left out
        alphas = [0.1, 10]
        models = ["mlp"]
        seeds = 3                               # 0, 1, 2; or a list
        lrs = [0.05, 0.1, 0.2]                  # for methods without an own grid
        baseline = "dsgd"                       # label that others are tested against
        lr_seeds = "all"                        # seeds that choose lr: "all" or "first"
        choose = "last"                         # accuracy at the end, or at the "best" validation accuracy
        plugins = ["my_method.py"]              # modules or files that register algorithms, data, models

        [train]                                 # any other field of TrainConfig
        data = "fashion-mnist"
        epochs = 8
        validation = 0.1

        [hyper]                                 # for every algorithm that has it
        weight_decay = 1e-4

        [[method]]
        algorithm = "relaysgd"
        label = "RelaySGD"
        lrs = [0.1, 0.2]
        hyper = { momentum = 0.5 }
        topology = "chain"
        train = { clip = 1.0 }

        [[published]]                           # see :class:`Published`
        method = "dsgd"
        topology = "ring:16"
        alpha = 0.1
        value = 74.55
        std = 2.07
        source = "..."

    Raises:
        TypeError, ValueError: if something does not fit; it is named with what was expected and what came.
    """

    title: str = ""
    description: str = ""
    methods: tuple[Method, ...]
    topologies: tuple[tuple[str, int], ...] = (("ring", 16),)
    alphas: tuple[float, ...] = (0.1,)
    models: tuple[str, ...] = ("mlp",)
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = ""
    lr_seeds: LrSeeds = "all"
    choose: Choose = "last"
    train: Mapping[str, Any] = field(default_factory=dict)
    hyper: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("a comparison needs algorithms or [[method]] tables, got none")
        for name in ("topologies", "alphas", "models", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must not be empty")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} holds something twice: {', '.join(map(str, values))}")
        for name, known in (("lr_seeds", get_args(LrSeeds)), ("choose", get_args(Choose))):
            check_name(name, getattr(self, name), known)
        for model in self.models:
            check_name("models", model, models.names())
        train = {"validation": _DEFAULT_VALIDATION, **self.train}
        _check_train("[train]", train)
        if train.get("partition", "dirichlet") != "dirichlet" and len(self.alphas) > 1:
            raise ValueError(
                f"alphas belong to the dirichlet partition; with partition {train['partition']!r} give one at most, "
                f"got {len(self.alphas)}"
            )
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "methods", tuple(map(self._complete, self.methods)))
        labels = [method.label for method in self.methods]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two methods have the label {label!r}; give one of them another label")
        for name in self.hyper:
            if not any(_has(method.algorithm, name) for method in self.methods):
                raise ValueError(f"[hyper] {name}: none of the algorithms has a hyper-parameter of this name")
        if not self.baseline:
            object.__setattr__(self, "baseline", self._default_baseline())
        check_name("baseline", self.baseline, labels)
        self._check_cells()

    def _default_baseline(self) -> str:
        decentralised = [method.label for method in self.methods if not is_centralised(method.algorithm)]
        return (decentralised or [self.methods[0].label])[0]

    def _complete(self, method: Method) -> Method:
        cls = algorithms.get_class(method.algorithm)  # raises for an unknown name, with the nearest
        own = next(f.default for f in dataclasses.fields(cls) if f.name == "lr")
        peak = 0.1 if own is dataclasses.MISSING else float(own)
        lrs = method.lrs or tuple(factor * peak for factor in _DEFAULT_FACTORS)
        for lr in lrs:
            check_number("lrs", lr, low=0.0)
        if len(set(lrs)) != len(lrs):
            raise ValueError(f"lrs of {method.algorithm} holds something twice: {', '.join(map(str, lrs))}")
        _check_train(f"train of method {method.algorithm}", method.train)
        if len(lrs) > 1 and not {**self.train, **method.train}.get("validation"):
            raise ValueError(
                f"{method.algorithm} has {len(lrs)} step sizes to choose from, and they are chosen on a validation "
                "set: validation must be > 0"
            )
        return dataclasses.replace(method, label=method.label or method.algorithm, lrs=tuple(sorted(map(float, lrs))))

    def _check_cells(self) -> None:
        """Build what each cell needs of algorithm, topology and config, so that no mistake is found after hours."""
        for cell in self.cells():
            try:
                config = self.config(cell, cell.method.lrs[0], self.seeds[0])
                for lr in cell.method.lrs[1:]:
                    self.config(cell, lr, self.seeds[0])
                for seed in self.seeds[1:]:
                    self.config(cell, cell.method.lrs[0], seed)
                algorithm = algorithms.get(config.algorithm, lr=config.lr, **config.hyper)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # told by warnings(), once
                    algorithm.check(topology.get(config.topology, config.workers), torch.zeros(config.workers, 1))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{cell}: {error}") from error

    def notes(self) -> list[str]:
        """What algorithms warn of on the topologies that they run on, each once."""
        found: dict[str, None] = {}
        for cell in self.cells():
            config = self.config(cell, cell.method.lrs[0], self.seeds[0])
            algorithm = algorithms.get(config.algorithm, lr=config.lr, **config.hyper)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                algorithm.check(topology.get(config.topology, config.workers), torch.zeros(config.workers, 1))
            found |= dict.fromkeys(str(warning.message) for warning in caught)
            if cell.method.topology is None and config.topology not in (cell.topology, "complete"):
                found[f"{cell.method.label} needs a tree: on {cell.topology} it runs on {config.topology}"] = None
        return list(found)

    def cells(self) -> Iterator[Cell]:
        """All cells: models, topologies, alphas, methods, the last the fastest."""
        alphas = self.alphas if self.train.get("partition", "dirichlet") == "dirichlet" else (None,)
        for model in self.models:
            for name, workers in self.topologies:
                for alpha in alphas:
                    for method in self.methods:
                        yield Cell(model, name, workers, alpha, method)

    def config(self, cell: Cell, lr: float, seed: int, threads: int = 1) -> TrainConfig:
        """The training run of a cell with one step size and seed."""
        method = cell.method
        hyper = {name: value for name, value in self.hyper.items() if _has(method.algorithm, name)}
        decided: dict[str, Any] = {
            "algorithm": method.algorithm,
            "hyper": {**hyper, **method.hyper},
            "topology": _fitting(method, cell.topology, cell.workers),
            "workers": cell.workers,
            "model": cell.model,
            "lr": lr,
            "seed": seed,
            "threads": threads,
        }
        if cell.alpha is not None:
            decided["alpha"] = cell.alpha
        return TrainConfig(**decided, **{**self.train, **method.train})

    def search_seeds(self) -> tuple[int, ...]:
        """The seeds with which every step size is tried."""
        return self.seeds[:1] if self.lr_seeds == "first" else self.seeds

    def as_dict(self) -> dict[str, Any]:
        """As in a TOML file, JSON-ready; :func:`from_dict` reads it."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["topologies"] = [f"{name}:{workers}" for name, workers in self.topologies]
        plain["method"] = [_sparse(dataclasses.asdict(method)) for method in plain.pop("methods")]
        plain["published"] = [_sparse(dataclasses.asdict(figure)) for figure in self.published]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def run_name(config: TrainConfig) -> str:
    """The folder name of a run: what it is, for people, and a digest of everything that decides its outcome.

    What has its default does not count, so that a field that comes later changes no name.

    Example:
        >>> run_name(TrainConfig(steps=5, threads=1)) == run_name(TrainConfig(steps=5, threads=2))
        True
    """
    usual = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | {"threads": config.threads}
    content = {key: value for key, value in config.as_dict().items() if value != usual[key]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    split = f"a{config.alpha:g}" if config.partition == "dirichlet" else config.partition
    words = (
        config.model,
        f"{config.topology}{config.workers}",
        split,
        config.algorithm,
        f"lr{config.lr:g}",
        f"s{config.seed}",
    )
    return "-".join((*words, digest))


def is_centralised(algorithm: str) -> bool:
    """Whether an algorithm averages exactly in every step, whatever the topology."""
    return algorithms.get_class(algorithm).needs.startswith("none")


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


def preset_names() -> list[str]:
    """The names that :func:`preset` takes.

    Example:
        >>> "paper-small" in preset_names()
        True
    """
    folder = resources.files("qgm_ext.presets")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


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
        raw = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not TOML: {error}") from error
    try:
        return from_dict(merge(raw, changes), folder)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def merge(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file with some keys replaced; tables (train, hyper) key by key.

    New ``algorithms`` replace all methods; what the file says of those it knows stays. New ``lrs`` replace all grids.
    """
    merged = dict(raw)
    for key, value in changes.items():
        merged[key] = {**raw.get(key, {}), **value} if isinstance(value, Mapping) else value
    if "algorithms" in changes:
        known = [method for method in raw.get("method", []) if method.get("algorithm") in changes["algorithms"]]
        merged["method"] = known
        named = {method["algorithm"] for method in known}
        merged["algorithms"] = [name for name in changes["algorithms"] if name not in named]
        labels = {method.get("label", method["algorithm"]) for method in known} | set(merged["algorithms"])
        if "baseline" not in changes and raw.get("baseline") not in labels:
            merged.pop("baseline", None)
    if "lrs" in changes:
        merged["method"] = [
            {key: value for key, value in method.items() if key != "lrs"} for method in merged.get("method", [])
        ]
    return merged


def from_dict(raw: Mapping[str, Any], folder: Path = Path()) -> Comparison:
    """Build a comparison from the content of a TOML file.

    Args:
        raw: the content; see :class:`Comparison`.
        folder: where plugins that are files stand.

    Raises:
        TypeError, ValueError: if a key is unknown or a value does not fit.
    """
    known = {f.name for f in dataclasses.fields(Comparison)} - {"methods"} | {"algorithms", "method", "lrs"}
    _check_keys("a comparison", raw, known)
    plain = dict(raw)
    plugins = [_located(plugin, folder) for plugin in _strings("plugins", plain.pop("plugins", []))]
    load_plugins(plugins)
    lrs = _numbers("lrs", plain.pop("lrs", []))
    listed = [Method(algorithm=name, lrs=lrs) for name in _strings("algorithms", plain.pop("algorithms", []))]
    tables = [_method(table, lrs) for table in _tables("method", plain.pop("method", []))]
    if "topologies" in plain:
        plain["topologies"] = tuple(map(_topology, _strings("topologies", plain["topologies"])))
    if "alphas" in plain:
        plain["alphas"] = _numbers("alphas", plain["alphas"])
    if "models" in plain:
        plain["models"] = tuple(_strings("models", plain["models"]))
    if "seeds" in plain:
        plain["seeds"] = _seeds(plain["seeds"])
    for name in ("title", "description", "baseline", "lr_seeds", "choose"):
        if not isinstance(plain.get(name, ""), str):
            raise TypeError(f"{name} must be a string, got {plain[name]!r}")
    for name in ("train", "hyper"):
        if not isinstance(plain.get(name, {}), Mapping):
            raise TypeError(f"{name} must be a table, got {plain[name]!r}")
    plain["hyper"] = _hyper(plain.get("hyper", {}))
    figures = tuple(map(_published, _tables("published", plain.pop("published", []))))
    return Comparison(methods=(*listed, *tables), published=figures, plugins=tuple(plugins), **plain)


def load_plugins(plugins: Iterable[str]) -> None:
    """Import modules, or files that end in .py, which register algorithms, data sets and models of their own.

    Raises:
        ValueError: if one can't be imported; names it.
    """
    for plugin in plugins:
        try:
            if plugin.endswith(".py"):
                _import_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except Exception as error:  # whatever a stranger's file raises
            raise ValueError(f"plugin {plugin} can't be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    name = f"qgm_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _located(plugin: str, folder: Path) -> str:
    return str((folder / plugin).resolve()) if plugin.endswith(".py") else plugin


def _fitting(method: Method, name: str, workers: int) -> str:
    """What a method runs on where the comparison says ``name``."""
    if method.topology is not None:
        return method.topology
    if is_centralised(method.algorithm):
        return "complete"  # none is used; one name, so that the cells of all topologies share their runs
    if algorithms.get_class(method.algorithm).needs == "tree":
        made = topology.get(name, workers)
        try:
            made.trees()
        except ValueError:
            tree = topology.TREE_PREFIX + name
            try:
                topology.get(tree, workers)
            except ValueError as error:
                raise ValueError(
                    f"{method.algorithm} needs a tree, and {name!r} has no spanning tree ({error}); give the method a "
                    "topology of its own, e.g. topology = 'chain'"
                ) from error
            return tree
    return name


def _has(algorithm: str, name: str) -> bool:
    return any(f.name == name for f in dataclasses.fields(algorithms.get_class(algorithm)))


def _check_train(where: str, train: Mapping[str, Any]) -> None:
    for name in train:
        if name in _DECIDED:
            raise ValueError(f"{where} can't set {name}: it is decided by {_DECIDED[name]}")
    _check_keys(where, train, _TRAIN_FIELDS)
    if "data" in train:
        check_name("data", train["data"], data.names())


def _check_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = sorted(known)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}"
            raise ValueError(f"{where} has no key {key!r}, {hint}")


def _sparse(table: Mapping[str, Any]) -> dict[str, Any]:
    empty: tuple[Any, ...] = (None, "", (), {})
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in table.items() if value not in empty
    }


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of strings, got {value!r}")
    return list(value)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
        raise TypeError(f"{name} must be a list of numbers, got {value!r}")
    return tuple(map(float, value))


def _tables(name: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise TypeError(f"{name} must be a list of tables, written [[{name}]], got {value!r}")
    return list(value)


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"seeds must be a number of at least 1 or a list, got {value}")
        return tuple(range(value))
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise TypeError(f"seeds must be a number or a list of integers, got {value!r}")
    return tuple(value)


def _topology(text: str) -> tuple[str, int]:
    """("ring", 16) from "ring:16"."""
    name, colon, count = text.partition(":")
    name = canonical_topology(name)
    check_name("topologies", name.removeprefix(topology.TREE_PREFIX), topology.names())
    if not colon:
        return name, default_workers(name)
    if not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise ValueError(f"topologies must be NAME or NAME:WORKERS, e.g. 'ring:16', got {text!r}")
    topology.get(name, int(count))  # raises where the topology asks something of the number
    return name, int(count)


def _hyper(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _method(table: Mapping[str, Any], lrs: tuple[float, ...]) -> Method:
    _check_keys("a method", table, [f.name for f in dataclasses.fields(Method)])
    if not isinstance(table.get("algorithm"), str):
        raise ValueError(f"a method needs an algorithm, a string; got {dict(table)!r}")
    plain = dict(table)
    where = f"method {plain['algorithm']}"
    plain["lrs"] = _numbers(f"lrs of {where}", plain["lrs"]) if "lrs" in plain else lrs
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
        plain["topology"] = canonical_topology(plain["topology"])
        check_name(f"topology of {where}", plain["topology"].removeprefix(topology.TREE_PREFIX), topology.names())
    return Method(**plain)


def _published(table: Mapping[str, Any]) -> Published:
    _check_keys("a published figure", table, [f.name for f in dataclasses.fields(Published)])
    for name in ("method", "value", "topology"):
        if name not in table:
            raise ValueError(f"a published figure needs a {name}, got {dict(table)!r}")
    plain = dict(table)
    for name in ("value", "std", "alpha"):
        number = plain.get(name, 0.0)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} of a published figure must be a number, got {number!r}")
    name, workers = _topology(plain["topology"])
    return Published(**{**plain, "topology": f"{name}:{workers}"})
