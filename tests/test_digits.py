"""Every algorithm learns handwritten digits that are split unevenly over 16 workers."""

from __future__ import annotations

import warnings

import pytest

from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import Training
from rows import ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_learns_digits(name: str) -> None:
    digits = ALGORITHMS[name].digits
    config = TrainConfig(
        algorithm=name,
        topology=digits.topology,
        workers=16,
        alpha=0.1,
        lr=digits.lr,
        epochs=digits.epochs,
        eval_every=digits.epochs,
        engine="loop",
        threads=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # d2 on a ring with an even number of workers
        with Training(config) as training:
            metrics = training.run().metrics
    assert metrics[0]["accuracy_local_mean"] < 0.2  # ten classes
    assert metrics[-1]["accuracy_local_mean"] > 0.4
