"""The examples run, write their pictures, and show what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import qgm_ext
from qgm_ext.experiments import comparison_files

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_every_example_is_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == [
        "consensus",
        "quadratics",
        "rosenbrock",
        "two_workers",
        "your_own",
    ]


@pytest.mark.parametrize("algorithm", ["dsgd", "qg_dsgdm", "qg_dsgdm_n"])
def test_consensus_is_what_theory_expects(algorithm: str) -> None:
    consensus = example("consensus")
    for n in (16, 64):
        found, theory = consensus.simulate(n, algorithm, 60), consensus.expected(n, algorithm, 60)
        np.testing.assert_allclose(found, theory, rtol=0.06)


def test_quasi_global_momentum_is_faster_on_the_long_ring_and_slower_later_on_the_short_one() -> None:
    expected = example("consensus").expected
    assert expected(64, "qg_dsgdm", 500)[500] < 0.01 * expected(64, "dsgd", 500)[500]
    assert expected(16, "qg_dsgdm", 100)[10] < expected(16, "dsgd", 100)[10]
    assert expected(16, "qg_dsgdm", 100)[100] > 10 * expected(16, "dsgd", 100)[100]


def test_consensus_writes_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("consensus").main(tmp_path, dim=50)
    assert is_picture(tmp_path / "consensus.png")
    assert "ring of 64" in capsys.readouterr().out


def test_two_workers_stray_with_plain_momentum_and_stay_together_with_quasi_global(tmp_path: Path) -> None:
    two_workers = example("two_workers")
    plain, quasi_global = (two_workers.simulate(name) for name in ("dsgdm", "qg_dsgdm"))

    def apart(path: np.ndarray) -> float:
        return float(np.linalg.norm(path[150:, 0] - path[150:, 1], axis=-1).mean())

    assert apart(plain) == pytest.approx(2.0, abs=0.05)  # 2 eta / (1 - beta): pulls of length one add up
    assert apart(quasi_global) == pytest.approx(0.2, abs=0.01)  # 2 eta: one pull each
    for path in (plain, quasi_global):
        assert two_workers.distance_to_segment(path[-100:].mean(axis=1)).mean() < 0.1
    two_workers.main(tmp_path)
    assert is_picture(tmp_path / "two_workers.png")


def test_quadratics_slow_gossip_down_and_bias_corrected_methods_hardly() -> None:
    quadratics = example("quadratics")
    for zeta in (0.0, 10.0):
        problem = quadratics.make_problem(zeta)
        at_optimum = problem.gradients(problem.optimum.expand(quadratics.N, -1))
        assert float((at_optimum**2).sum(1).mean()) == pytest.approx(zeta, abs=1e-12)
        assert float(at_optimum.mean(0).abs().max()) < 1e-12
    hard = quadratics.make_problem(10.0)
    assert quadratics.steps_to_target(hard, "dsgd", "ring", 0.15, 1000) is None
    assert quadratics.steps_to_target(hard, "d2", "ring", 0.26, 100) is not None
    assert quadratics.steps_to_target(hard, "relaysgd", "chain", 1.0, 200) is not None


def test_relayed_steps_come_to_rest_off_the_optimum_and_relayed_models_on_it() -> None:
    """What the docstring of the example says of RelaySGD/Grad, whose figure is not the published one."""
    quadratics = example("quadratics")

    def rest(algorithm: str, zeta: float, lr: float, steps: int | None = None) -> float:
        problem = quadratics.make_problem(zeta)
        x = torch.zeros(quadratics.N, quadratics.DIM, dtype=torch.float64)
        opt = qgm_ext.StackedOptimizer(x, qgm_ext.topology.chain(quadratics.N), algorithm, lr=lr, momentum=0.0)
        for _ in range(steps or round(40 / lr)):
            opt.step(problem.gradients(opt.x))
        return float(problem.suboptimality(opt.x))

    assert rest("relaysgd_grad", 10.0, 0.1) == pytest.approx(5.05e-5, rel=0.01)
    assert rest("relaysgd_grad", 10.0, 0.02) == pytest.approx(3.15e-6, rel=0.01)
    assert rest("relaysgd_grad", 0.1, 0.1) == pytest.approx(5.05e-7, rel=0.01)
    assert rest("relaysgd", 10.0, 1.0, 800) < 1e-20


def test_rosenbrock_needs_momentum_that_does_not_add_up_the_workers_own_pulls(tmp_path: Path) -> None:
    rosenbrock = example("rosenbrock")
    paths = {name: rosenbrock.simulate(name) for name in ("dsgd", "dsgdm", "qg_dsgdm")}
    assert rosenbrock.steps_to(paths["dsgd"], 0.2) is None
    assert rosenbrock.steps_to(paths["dsgdm"], 0.2) < 1500
    assert rosenbrock.steps_to(paths["qg_dsgdm"], 0.2) < 1500
    assert min(rosenbrock.ends(paths["dsgdm"])) > 0.2
    assert max(rosenbrock.ends(paths["qg_dsgdm"])) < 0.01
    rosenbrock.main(tmp_path)
    assert is_picture(tmp_path / "rosenbrock.png")


def test_a_method_a_data_set_and_a_model_from_outside_get_their_row(tmp_path: Path) -> None:
    lines = (EXAMPLES / "your_own.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(("import", "from", "#", '"""'))]
    assert len(code) <= 30
    assert "qgm compare examples/your_own.toml" in (EXAMPLES / "your_own.md").read_text()
    words = ["compare", str(EXAMPLES / "your_own.toml"), "--seeds", "2", "--out", str(tmp_path / "out")]
    ran = subprocess.run(  # in a process of its own: what it registers stays
        [sys.executable, "-m", "qgm_ext", *words, "--epochs", "2", "--processes", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "tanh on rings, ring of 8" in ran.stdout
    assert re.search(r"fading_dsgdm +\d\d\.\d ± \d", ran.stdout), ran.stdout


def test_the_word_models_of_the_adam_comparisons_differ_in_what_is_trained_alone() -> None:
    """benchmarks/adam: from equal starts, dense gradients with fixed word vectors and mostly zero ones with trained."""
    folder = EXAMPLES.parent / "benchmarks" / "adam"
    plans = {name: comparison_files.read(folder / f"{name}.toml") for name in ("fixed", "trained", "digits")}
    assert [plans[name].models for name in plans] == [("words_fixed",), ("words_trained",), ("mlp",)]
    tokens = torch.randint(1, 4096, (16, 20), generator=torch.Generator().manual_seed(0))
    outputs, zeros = [], []
    for name in ("words_fixed", "words_trained"):
        torch.manual_seed(0)
        model = qgm_ext.models.get(name, (20,), 13, vocabulary=4096)
        outputs.append(model(tokens))
        outputs[-1].square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        zeros.append(float((gradient == 0).double().mean()))
    assert torch.equal(*outputs)
    assert zeros[0] < 0.1
    assert zeros[1] > 0.9
