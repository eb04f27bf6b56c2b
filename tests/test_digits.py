"""Every algorithm learns handwritten digits that are split unevenly over 16 workers.

The step sizes are good ones for so short a run, not the best for a long one.
"""

from __future__ import annotations

import warnings

import pytest

from qgm_ext import algorithms
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import Training

# Algorithm: step size. Centralised and momentum methods are fast at 0.1, plain gossip needs more, Adam less.
LEARNING_RATES = {
    "cadam": 0.01,
    "ccl": 0.1,
    "choco_sgd": 0.5,
    "comp_n_saddle": 0.3,
    "comp_ngc": 0.3,
    "comp_q_saddle": 0.1,
    "csgd": 0.1,
    "csgdm": 0.1,
    "csgdm_n": 0.1,
    "d2": 0.1,
    "d2_plus": 0.1,
    "d_adam": 0.03,
    "damsgrad": 0.01,
    "decentlam": 0.1,
    "dsgd": 0.5,
    "dsgd_cta": 0.5,
    "dsgdm": 0.1,
    "dsgdm_n": 0.1,
    "exact_diffusion": 0.1,
    "gradient_tracking": 0.1,
    "gradient_tracking_atc": 0.1,
    "gradient_tracking_m": 0.1,
    "gradient_tracking_m_n": 0.1,
    "gut": 0.1,
    "momentum_tracking": 0.1,
    "n_saddle": 0.3,
    "ngc": 0.3,
    "q_saddle": 0.1,
    "qg_dadam": 0.01,
    "qg_dsgdm": 0.1,
    "qg_dsgdm_n": 0.1,
    "qg_gutm": 0.1,
    "qg_sgp": 0.1,
    "relaysgd": 0.1,
    "relaysgd_grad": 0.1,
    "sgp": 0.1,
    "slowmo": 0.1,
}
# Another topology than the ring, where an algorithm needs trees or is made for directed graphs.
TOPOLOGIES = {"relaysgd": "chain", "relaysgd_grad": "chain", "sgp": "random_directed", "qg_sgp": "random_directed"}
# Those that compute more gradients a step learn in fewer of them.
SHORT = {"ngc", "comp_ngc", "n_saddle", "comp_n_saddle"}


def test_every_algorithm_has_a_row() -> None:
    assert set(LEARNING_RATES) == set(algorithms.names())


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_algorithm_learns_digits(name: str) -> None:
    epochs = 5 if name in SHORT else 10
    config = TrainConfig(
        algorithm=name,
        topology=TOPOLOGIES.get(name, "ring"),
        workers=16,
        alpha=0.1,
        lr=LEARNING_RATES[name],
        epochs=epochs,
        eval_every=epochs,
        engine="loop",
        threads=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # d2 on a ring with an even number of workers
        with Training(config) as training:
            metrics = training.run().metrics
    assert metrics[0]["accuracy_local_mean"] < 0.2  # ten classes
    assert metrics[-1]["accuracy_local_mean"] > 0.4
