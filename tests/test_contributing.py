"""The examples of CONTRIBUTING.md: an algorithm from outside the package, and one with a rule of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgm_ext import StackedOptimizer, algorithms, reference, topology
from qgm_ext.algorithms import base

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")


def example(kind: str) -> str:
    found = re.search(rf"<!-- example: {kind} -->\n```\w+\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def run_example(kind: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "outside"}
    exec(compile(example(kind), "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def seldom_dsgdm():
    run_example("python")
    yield "seldom_dsgdm"
    del base._registry["seldom_dsgdm"]


def test_an_algorithm_from_outside_runs_and_resumes(seldom_dsgdm):
    ring = topology.ring(6)
    start = torch.zeros(6, 40)

    def gradient(t: int) -> torch.Tensor:
        return torch.randn(6, 40, generator=torch.Generator().manual_seed(t))

    always = StackedOptimizer(start.clone(), ring, seldom_dsgdm, lr=0.1, period=1)
    known = StackedOptimizer(start.clone(), ring, "dsgdm", lr=0.1)
    seldom = StackedOptimizer(start.clone(), ring, seldom_dsgdm, lr=0.1, period=4)
    alone = StackedOptimizer(
        start.clone(), topology.from_matrix(torch.eye(6).numpy(), allow_disconnected=True), "dsgdm", lr=0.1
    )
    for t in range(3):
        for opt in (always, known, seldom, alone):
            opt.step(gradient(t))
    assert torch.equal(always.x, known.x)
    assert torch.equal(seldom.x, alone.x)
    resumed = StackedOptimizer(seldom.x.clone(), ring, seldom_dsgdm, lr=0.1, period=4)
    resumed.load_state_dict(seldom.state_dict())
    for t in range(3, 9):
        seldom.step(gradient(t))
        resumed.step(gradient(t))
    assert torch.equal(seldom.x, resumed.x)
    assert seldom.bytes_sent == 2 * 12 * 40 * 4
    assert seldom_dsgdm in algorithms.names()


MAIN = """
#include "cpu/registry.h"
#include "rules/sign_dsgd.h"
#include <cstdio>
static const bool registered = qgm::cpu::register_rules(qgm::rules::sign_dsgd::Rules{});
int main() {
  float x[4] = {1, 2, 3, 4}, g[4] = {5, -5, 0, 1};
  const double hyper[] = {0.5};
  qgm::cpu::GossipStepArguments a{};
  a.x = x, a.g = g, a.rows = 2, a.cols = 2, a.x_stride = a.g_stride = 2, a.hyper = hyper, a.threads = 1;
  a.mixing.form = qgm::MixingForm::kMean;
  qgm::cpu::registry().at(0).gossip_step[0](a);
  std::printf("%s %g %g %g %g", qgm::cpu::registry().at(0).name.c_str(), x[0], x[1], x[2], x[3]);
}
"""


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER} not on PATH")
def test_a_rule_from_outside_compiles_and_steps(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc/rules/sign_dsgd.h").write_text(example("rule"))
    (tmp_path / "main.cpp").write_text(MAIN)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-DQGM_ONE_SIMD_LEVEL", "-fopenmp", f"-I{tmp_path / 'csrc'}"]
    subprocess.run([COMPILER, *flags, str(tmp_path / "main.cpp"), "-o", str(tmp_path / "step")], check=True)
    out = subprocess.run([str(tmp_path / "step")], capture_output=True, text=True, check=True).stdout
    # Local steps: (0.5, 2.5) and (3, 3.5); their mean.
    assert out == "sign_dsgd 1.75 3 1.75 3"


def test_the_new_rule_has_a_python_file_and_a_row():
    """They give what the compiled rule gives, on the same numbers."""
    x, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, -5.0], [0.0, 1.0]])
    expected = torch.tensor([[1.75, 3.0], [1.75, 3.0]])
    run_example("algorithm")
    try:
        algorithm = algorithms.get("sign_dsgd", lr=0.5)
        w = torch.full((2, 2), 0.5)
        assert torch.equal(reference.step(algorithm, x, g, {}, w)[0], expected)
        names = run_example("row")
        assert names["ALGORITHMS"].keys() == names["RULES"].keys() == {algorithm.rule}
        text = names["RULES"][algorithm.rule].text(np.float32, algorithm.hyper(0, 0.5))
        half = [text.local(x[i].numpy(), g[i].numpy(), [])[0] for i in range(2)]
        mixed = (half[0] + half[1]) * np.float32(0.5)
        assert [text.merge(x[i].numpy(), g[i].numpy(), [], [mixed]).tolist() for i in range(2)] == expected.tolist()
    finally:
        del base._registry["sign_dsgd"]
