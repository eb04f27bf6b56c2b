"""What a run is made from, by its config: the data set, its split over workers, and the model before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qgm_ext import data, models
from qgm_ext.experiments.config import TrainConfig

__all__ = ["describe_partition", "load_data", "make_model", "make_partition", "placed"]


def load_data(config: TrainConfig) -> data.Dataset:
    """The data set of a run; its texts are split into the tokens of the pretrained model, if there is one.

    Raises: as :func:`qgm_ext.data.load`.
    """
    tokenizer = None
    if config.pretrained is not None and models.takes_texts(config.model):
        tokenizer = data.PretrainedTokenizer(config.pretrained)
    return data.load(config.data, config.data_root, num_train=config.num_train, seed=config.seed, tokenizer=tokenizer)


def make_model(config: TrainConfig, dataset: data.Dataset) -> nn.Module:
    """The model of a run, for the data."""
    if models.takes_texts(config.model) != (dataset.vocabulary is not None):
        kinds = [name for name in models.names() if models.takes_texts(name) == (dataset.vocabulary is not None)]
        raise ValueError(f"{config.model} is no model for {dataset.name}; there are {', '.join(kinds)}")
    options: dict[str, Any] = {} if dataset.vocabulary is None else {"vocabulary": dataset.vocabulary}
    if config.pretrained is not None:
        options["pretrained"] = config.pretrained
    return models.get(config.model, dataset.input_shape, dataset.num_classes, **options)


def placed(samples: Tensor | data.ImageFiles, device: torch.device, dtype: torch.dtype) -> Tensor | data.ImageFiles:
    """Samples on a device; images in the dtype of the parameters, tokens stay numbers."""
    if isinstance(samples, Tensor) and not samples.is_floating_point():
        return samples.to(device)
    return samples.to(device, dtype)


def make_partition(config: TrainConfig, dataset: data.Dataset, kept: npt.NDArray[np.int64]) -> data.Partition:
    """The split of the samples ``kept``, in positions of the whole training set."""
    labels = dataset.train_y.numpy()[kept]
    if config.partition == "dirichlet":
        split = data.dirichlet_partition(labels, config.workers, config.alpha, config.seed)
    elif config.partition == "iid":
        split = data.iid_partition(labels, config.workers, config.seed)
    elif config.partition == "classes":
        split = data.classes_partition(labels, config.workers, config.classes_per_worker, config.seed)
    else:
        split = data.sorted_partition(labels, config.workers)
    return split.within(kept)


def describe_partition(config: TrainConfig) -> str:
    if config.partition == "classes":
        return f"{config.classes_per_worker} classes per worker"
    return f"alpha {config.alpha:g}" if config.partition == "dirichlet" else config.partition
