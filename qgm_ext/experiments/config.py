"""TrainConfig: everything that decides the outcome of a training run, checked, and its form in config.json.

What does not decide the outcome (where the run is stored, how often it is saved, how it is shown) is not here.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qgm_ext import algorithms, data, messages, models, topology, topology_names
from qgm_ext.algorithms import check_number
from qgm_ext.data import augment as augmentation
from qgm_ext.distributed.options import RuntimeOptions
from qgm_ext.experiments import schedules
from qgm_ext.hints import check_name, did_you_mean
from qgm_ext.simulator import EngineChoice
from qgm_ext.stacked import OnNonfinite

__all__ = ["CONFIG_FORMAT", "FOR_PROCESSES", "TrainConfig", "dumps", "loads", "parse", "parse_hyper"]

CONFIG_FORMAT = "qgm_ext.train/3"

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENGINES: tuple[str, ...] = typing.get_args(EngineChoice)
PARTITIONS = ("dirichlet", "iid", "sorted", "classes")
ON_NONFINITE: tuple[str, ...] = typing.get_args(OnNonfinite)

# Options of workers in processes of their own alone.
FOR_PROCESSES = ("overlap", "bucket_mb", "staleness")
# Fields that came later: not in files where they have these values, so that older runs go on, with the same digest.
_UNSAID: dict[str, Any] = {name: getattr(RuntimeOptions, name) for name in FOR_PROCESSES}

_LATER: Any = None  # filled in by __post_init__, so that the field's type can be what users of a config see
_DEFAULT_LR = 0.1
_DEFAULT_EPOCHS = 100
# How often a run is evaluated if nothing is said: enough points for a curve, little time.
_DEFAULT_EVALUATIONS = 20


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of n workers on one device. None means: fill in the default; no None is left but where noted.

    Args:
        algorithm: a name from :func:`qgm_ext.algorithms.names`.
        hyper: its hyper-parameters except lr; those left out take the algorithm's defaults.
        topology: a name from :func:`qgm_ext.topology.names`.
        workers: n >= 1. (Default: 16, or what the topology prescribes.)
        data: a name from :func:`qgm_ext.data.names`.
        data_root: folder of the data set's files; None: the usual places.
        num_train: use so many training samples; None: all.
        validation: share of the training set, in [0, 1), that no worker gets and that is evaluated beside the test
            set, for choosing hyper-parameters; drawn with ``seed`` before the partition.
        augment: how training images are changed at random, see :mod:`qgm_ext.data.augment`.
        partition: how the training set is split: "dirichlet", "iid", "sorted" or "classes".
        alpha: heterogeneity of the Dirichlet partition, > 0; small is heterogeneous.
        classes_per_worker: of the partition "classes", >= 1.
        model: a name from :func:`qgm_ext.models.names`.
        pretrained: folder with weights, and for texts a tokenizer, to start from; None: random weights. Of distilbert.
        epochs: length of the run; None if ``steps`` says it. (Default: 100.)
        steps: length of the run; None if ``epochs`` says it.
        batch: samples per worker and step, >= 1.
        lr: peak step size, >= 0, but see ``base_batch``. (Default: the algorithm's own, else 0.1.)
        base_batch: scale the peak with the samples of a step: ``lr`` is for so many of all workers together, the peak
            is lr workers batch / base_batch; None: ``lr`` is the peak.
        schedule: "constant", "step" or "cosine", see :class:`qgm_ext.experiments.schedules.Schedule`.
        milestones: of the schedule "step": where the step size falls by 10, shares of the run, ascending.
        warmup_epochs: length of the warm-up, >= 0.
        warmup_from: step size at its start, in [0, peak]. (Default: lr / 10; with ``base_batch`` lr, or the peak if
            that is less.)
        clip: largest gradient norm of a worker, > 0; None: no clipping.
        seed: of the initial model, the partition, the batches, ``validation`` and ``num_train``; in [0, 2**32).
        dtype: of parameters and gradients: "float32", "float64", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:i".
        engine: how gradients are computed, see :mod:`qgm_ext.engines`: "loop", "threads", "vmap", or "auto", which is
            measured at the start and then kept; other engines give other last bits. (Default: "threads", whose bits
            don't depend on the number of threads; on CUDA "vmap"; "loop" for models that these can't run.)
        threads: CPU threads. (Default: as torch has it.)
        eval_every: epochs between evaluations, >= 1. (Default: about 20 evaluations in a run.)
        on_nonfinite: "raise", "skip" or "ignore" a gradient with an infinity or NaN.
        message: how messages to neighbours are written (:mod:`qgm_ext.messages`): "float32", which is as they are, or
            "bfloat16" or "int8" with error feedback.
        overlap, bucket_mb, staleness: of workers in processes of their own, as in
            :class:`qgm_ext.distributed.RuntimeOptions`. The first two leave the bits as they are.

    Raises:
        TypeError, ValueError: if a field is wrong; it is named with what was expected and what came.

    Example:
        >>> config = TrainConfig(algorithm="dsgdm", hyper={"momentum": 0.5}, steps=10)
        >>> config.hyper, config.epochs
        ({'weight_decay': 0.0, 'momentum': 0.5}, None)
    """

    algorithm: str = "qg_dsgdm_n"
    hyper: Mapping[str, Any] = field(default_factory=dict)
    topology: str = "ring"
    workers: int = _LATER
    data: str = "digits"
    data_root: str | None = None
    num_train: int | None = None
    validation: float = 0.0
    augment: str = "none"
    partition: str = "dirichlet"
    alpha: float = 0.1
    classes_per_worker: int = 2
    model: str = "mlp"
    pretrained: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch: int = 16
    lr: float = _LATER
    base_batch: int | None = None
    schedule: str = "constant"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup_epochs: float = 0.0
    warmup_from: float = _LATER
    clip: float | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    engine: EngineChoice = _LATER
    threads: int = _LATER
    eval_every: int = _LATER
    on_nonfinite: OnNonfinite = "raise"
    message: str = "float32"
    overlap: bool = False
    bucket_mb: float = RuntimeOptions.bucket_mb
    staleness: int = 0

    def __post_init__(self) -> None:
        self._check_names()
        self._fill("lr", _own_default(algorithms.get_class(self.algorithm), "lr", _DEFAULT_LR))
        check_number("lr", self.lr, low=0.0)
        object.__setattr__(self, "hyper", self._complete_hyper())
        self._fill("workers", topology_names.default_workers(self.topology))
        self._fill("threads", torch.get_num_threads())
        for name, low in (("workers", 1), ("batch", 1), ("threads", 1), ("classes_per_worker", 1)):
            _check_integer(name, getattr(self, name), low)
        _check_integer("seed", self.seed, 0, 2**32 - 1)
        for name in ("num_train", "epochs", "steps", "base_batch"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"give epochs or steps, not both: got epochs={self.epochs} and steps={self.steps}")
        if self.steps is None:
            self._fill("epochs", _DEFAULT_EPOCHS)
        self._fill("eval_every", max(1, -(-(self.epochs or 1) // _DEFAULT_EVALUATIONS)))
        _check_integer("eval_every", self.eval_every, 1)
        check_number("validation", self.validation, low=0.0)
        if self.validation >= 1:
            raise ValueError(f"validation must be in [0, 1), got {self.validation:g}")
        check_number("alpha", self.alpha, low=0.0)
        if self.alpha == 0:
            raise ValueError("alpha must be a finite number > 0, got 0")
        if self.clip is not None:
            check_number("clip", self.clip, low=0.0)
            if self.clip == 0:
                raise ValueError("clip must be a finite number > 0, got 0")
        check_number("warmup_epochs", self.warmup_epochs, low=0.0)
        self._fill("warmup_from", self.lr / 10 if self.base_batch is None else min(self.lr, self.peak_lr))
        check_number("warmup_from", self.warmup_from, low=0.0, high=self.peak_lr)
        object.__setattr__(self, "milestones", schedules.check_milestones(self.milestones))
        if self.epochs is not None and self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must be at most the {self.epochs} epochs, got {self.warmup_epochs:g}")
        for name in ("data_root", "pretrained"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {type(getattr(self, name)).__name__}")
        _check_device(self.device)
        options = {name: getattr(self, name) for name in (*FOR_PROCESSES, "message")}
        RuntimeOptions(**options).check_nonfinite(self.on_nonfinite)

    def _check_names(self) -> None:
        algorithms.get_class(self.algorithm)  # raises for an unknown name, with the nearest
        check_name("model", self.model, models.names())
        self._fill("engine", models.default_engine(self.model, str(self.device)))
        for name, known in (
            ("topology", topology.names()),
            ("data", data.names()),
            ("augment", augmentation.NAMES),
            ("partition", PARTITIONS),
            ("schedule", schedules.names()),
            ("dtype", tuple(DTYPES)),
            ("engine", ENGINES),
            ("on_nonfinite", ON_NONFINITE),
            ("message", messages.NAMES),
        ):
            value = getattr(self, name)
            if name == "topology":
                value = topology_names.canonical(value)
                object.__setattr__(self, name, value)
                value = value.removeprefix(topology.TREE_PREFIX)
            check_name(name, value, known)
        if self.engine == "threads" and models.draws(self.model):
            raise ValueError(
                f"engine 'threads' can't run {self.model}, which draws random numbers in training (dropout): threads "
                "would draw in no fixed order; use 'loop' or 'vmap', or leave engine out"
            )

    def _complete_hyper(self) -> dict[str, Any]:
        """The algorithm's hyper-parameters with its defaults filled in, so that a later default can't change a run."""
        if "lr" in self.hyper:
            raise ValueError("lr is an argument of its own, not one of hyper")
        algorithm = algorithms.get(self.algorithm, lr=self.lr, **self.hyper)
        messages.make(self.message, [algorithm])
        complete = algorithm.describe()
        return {key: value for key, value in complete.items() if key not in ("name", "lr")}

    def _fill(self, name: str, default: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    @property
    def peak_lr(self) -> float:
        """The step size after the warm-up and before any decay."""
        return self.lr if self.base_batch is None else self.lr * self.workers * self.batch / self.base_batch

    def num_steps(self, steps_per_epoch: int) -> int:
        """Length of the run in steps."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and gradients."""
        return DTYPES[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"hyper": dict(self.hyper)}

    def contradictions(self, given: Mapping[str, Any]) -> list[str]:
        """What in ``given`` (fields, and hyper-parameters under "hyper") differs from this run, for a person.

        Example:
            >>> TrainConfig(steps=5).contradictions({"steps": 5, "seed": 3, "hyper": {"momentum": 0.9}})
            ['seed is 0 in the run, 3 was given']
        """
        found = []
        for name, value in given.items():
            pairs = value.items() if name == "hyper" else [(name, value)]
            for key, wanted in pairs:
                mine = self.hyper.get(key) if name == "hyper" else getattr(self, key)
                if key == "topology":
                    wanted = topology_names.canonical(wanted)
                if mine != wanted:
                    found.append(f"{key} is {mine!r} in the run, {wanted!r} was given")
        return found


def dumps(config: TrainConfig, about: Mapping[str, Any]) -> str:
    """The text of config.json. ``about``: what a reader wants to know of the run besides (versions, ...)."""
    content = {key: value for key, value in config.as_dict().items() if (key, value) not in _UNSAID.items()}
    return json.dumps({"format": CONFIG_FORMAT, **about, "config": content}, indent=2) + "\n"


def loads(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Read a config.json: the config, and what else stands in it.

    Raises:
        ValueError: if it is damaged or of another version; names the file.
        OSError: if it can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from error
    return parse(text, path)


def parse(text: str, path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The same for the text of a config.json that came another way; ``path`` is for the errors.

    Raises:
        ValueError: as :func:`loads`.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path} is damaged or no config of qgm train: it has no 'format'")
    if content["format"] != CONFIG_FORMAT:
        raise ValueError(
            f"{path} is of version {content['format']!r}, this qgm_ext reads {CONFIG_FORMAT!r}; "
            f"resume with the qgm_ext that wrote it ({content.get('qgm_ext', 'unknown')})"
        )
    stored = content.get("config")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if isinstance(stored, dict):
        stored = _UNSAID | stored
    if not isinstance(stored, dict) or stored.keys() != known:
        differing = sorted(known ^ stored.keys()) if isinstance(stored, dict) else ["config"]
        raise ValueError(f"{path} is damaged: missing or unknown fields {', '.join(differing)}")
    try:
        hyper = {key: tuple(v) if isinstance(v, list) else v for key, v in stored["hyper"].items()}
        return TrainConfig(**{**stored, "hyper": hyper}), content
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse_hyper(algorithm: str, name: str, text: str) -> Any:
    """A hyper-parameter from its text on the command line, as the type that the algorithm declares.

    Example:
        >>> parse_hyper("qg_dsgdm_n", "local_step", "4")
        4

    Raises:
        ValueError: if the algorithm has no such hyper-parameter, or the text is of no such type.
    """
    cls = algorithms.get_class(algorithm)
    fields = {f.name for f in dataclasses.fields(cls)}
    if name not in fields:
        hint = did_you_mean(name, fields, f"it has {', '.join(sorted(fields))}")
        raise ValueError(f"{algorithm} has no hyper-parameter {name!r}, {hint}")
    wanted = typing.get_type_hints(cls)[name]
    if wanted is str or typing.get_origin(wanted) is typing.Literal:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # nan and inf are no Python literals; let the algorithm say what it expects of them
        value = float(text) if re.fullmatch(r"[+-]?(nan|inf(inity)?)", text.lower()) else text
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _check_device(device: Any) -> None:
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:i', got {device!r}")


def _own_default(cls: type[algorithms.Algorithm], name: str, default: float) -> float:
    """The default that an algorithm gives one of its fields, or ``default`` if it gives none."""
    own = {f.name: f.default for f in dataclasses.fields(cls)}[name]
    return default if own is dataclasses.MISSING else own
