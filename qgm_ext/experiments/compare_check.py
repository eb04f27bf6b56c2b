"""What would stop a run of a comparison, found before the first of them: in the parent, in seconds.

A mistake in one cell would otherwise be found when its turn comes, after hours of others. What needs the whole
simulator is left to the runs; words and numbers have been checked by
:class:`~qgm_ext.experiments.comparison.Comparison`.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from qgm_ext import data
from qgm_ext.experiments import inputs
from qgm_ext.experiments.comparison import Comparison

__all__ = ["check"]

# What decides, besides the data, whether they can be split over workers and batches.
_SPLIT_FIELDS = (
    "seed",
    "validation",
    "partition",
    "workers",
    "alpha",
    "classes_per_worker",
    "batch",
    "augment",
    "epochs",
    "steps",
    "warmup_epochs",
)


def check(plan: Comparison) -> None:
    """Look for the devices, load the data, build the models, and split the data over the workers of all cells.

    Raises:
        ValueError, TypeError: if the data can't be split, or something does not fit together; names the cell and seed.
        OSError, ImportError: if data or weights are missing, or what reads them.
    """
    datasets: dict[Hashable, data.Dataset] = {}
    done: set[Hashable] = set()
    for cell in plan.cells():
        for seed in plan.seeds:
            config = plan.config(cell, cell.method.lrs[0], seed)
            inputs.check_device(config.device)
            what = (config.data, config.data_root, config.pretrained, config.num_train)
            source = (*what, None if config.num_train is None else seed)
            if source not in datasets:
                datasets[source] = inputs.load_data(config)
            model = (*what, config.model)
            split = (source, *(getattr(config, name) for name in _SPLIT_FIELDS))
            try:
                if model not in done:
                    with torch.random.fork_rng(devices=[]):
                        inputs.make_model(config, datasets[source])
                if split not in done:
                    inputs.check(config, datasets[source])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{cell}, seed {seed}: {error}") from error
            done |= {model, split}
