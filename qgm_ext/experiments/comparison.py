"""Comparison: which methods are compared on what, checked.

A comparison is a grid: models x topologies x alphas make cells, in each cell every method is trained with every step
size of its grid and every seed. It holds no training (:mod:`qgm_ext.experiments.compare`), no results
(:mod:`qgm_ext.experiments.results`) and no files (:mod:`qgm_ext.experiments.comparison_files`). The format of the TOML
file is told in :class:`Comparison`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from qgm_ext import algorithms, data, models, topology
from qgm_ext.algorithms import check_number
from qgm_ext.experiments.config import FOR_PROCESSES, TrainConfig
from qgm_ext.hints import check_name, did_you_mean

__all__ = ["Cell", "Comparison", "Method", "Published", "check_keys", "is_centralised", "run_name"]

FORMAT = "qgm_ext.compare/1"

Choose = Literal["last", "best"]
Metric = Literal["mean", "worst"]
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
_TRAIN_FIELDS = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name not in {*_DECIDED, *FOR_PROCESSES})
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
        method: label of a method of the comparison, or another name: then it is a row without own figures. One that
            differs from a label only in case, spaces and hyphens is taken for a mistake.
        value: accuracy in percent, of the comparison's metric.
        topology: one of the comparison's, "ring:16".
        alpha: the heterogeneity it belongs to, one of the comparison's; None: all.
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

    def check_place(
        self, topologies: Sequence[tuple[str, int]], alphas: Sequence[float], models: Sequence[str]
    ) -> None:
        """Raise ValueError unless a comparison of these has the topology, alpha and model; says which there are."""
        check_name(f"topology of {self}", self.topology, [f"{name}:{workers}" for name, workers in topologies])
        if self.model is not None:
            check_name(f"model of {self}", self.model, models)
        if self.alpha is not None and self.alpha not in alphas:
            known = ", ".join(f"{alpha:g}" for alpha in alphas)
            raise ValueError(f"alpha of {self} must be one of {known}, got {self.alpha:g}")

    def __str__(self) -> str:
        return f"the published figure {self.value:g} of {self.method!r}"


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
        metric = "mean"                         # of the local models' accuracies: their "mean", or that of the "worst"
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
    metric: Metric = "mean"
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
        for name, known in (("lr_seeds", LrSeeds), ("choose", Choose), ("metric", Metric)):
            check_name(name, getattr(self, name), get_args(known))
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
        of_any = {name for method in self.methods for name in _hyper_names(method.algorithm)}
        for name in self.hyper:
            if name not in of_any:
                hint = did_you_mean(name, of_any)
                raise ValueError(
                    f"[hyper] {name}: none of the algorithms has a hyper-parameter of this name{hint and f', {hint}'}"
                )
        if not self.baseline:
            object.__setattr__(self, "baseline", self._default_baseline())
        check_name("baseline", self.baseline, labels)
        for figure in self.published:
            self._check_published(figure)
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

    def _check_published(self, figure: Published) -> None:
        """Refuse a figure that would be shown nowhere, or not beside the method it is of."""
        by_letters = {_letters(method.label): method.label for method in self.methods}
        label = by_letters.get(_letters(figure.method), figure.method)
        if label != figure.method:
            raise ValueError(f"method of {figure} is no label of the comparison; did you mean {label!r}?")
        if figure.alpha is not None and not self._has_alphas():
            raise ValueError(f"alpha of {figure} must be left out: partition {self.train['partition']!r} has none")
        figure.check_place(self.topologies, self.alphas, self.models)

    def _has_alphas(self) -> bool:
        return bool(self.train.get("partition", "dirichlet") == "dirichlet")

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
        alphas = self.alphas if self._has_alphas() else (None,)
        for model in self.models:
            for name, workers in self.topologies:
                for alpha in alphas:
                    for method in self.methods:
                        yield Cell(model, name, workers, alpha, method)

    def config(self, cell: Cell, lr: float, seed: int, threads: int = 1) -> TrainConfig:
        """The training run of a cell with one step size and seed."""
        method = cell.method
        known = _hyper_names(method.algorithm)
        hyper = {name: value for name, value in self.hyper.items() if name in known}
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
        """As in a TOML file, JSON-ready; ``comparison_files.from_dict`` reads it."""
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


def _letters(label: str) -> str:
    return label.casefold().translate({ord(c): None for c in " -_"})


def _hyper_names(algorithm: str) -> set[str]:
    return {f.name for f in dataclasses.fields(algorithms.get_class(algorithm))}


def _check_train(where: str, train: Mapping[str, Any]) -> None:
    for name in train:
        if name in _DECIDED:
            raise ValueError(f"{where} can't set {name}: it is decided by {_DECIDED[name]}")
    check_keys(where, train, _TRAIN_FIELDS)
    if "data" in train:
        check_name("data", train["data"], data.names())


def check_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = sorted(known)
    for key in given:
        if key not in names:
            hint = did_you_mean(key, names, f"it takes {', '.join(names)}")
            raise ValueError(f"{where} has no key {key!r}, {hint}")


def _sparse(table: Mapping[str, Any]) -> dict[str, Any]:
    empty: tuple[Any, ...] = (None, "", (), {})
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in table.items() if value not in empty
    }
