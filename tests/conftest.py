"""Child processes of the tests import the installed package, not the source folder that they are started in.

The source folder holds no native module after a plain ``pip install .``. Heeded by Python 3.11 and newer.

Test processes side by side (``pytest -n 2``) share the cores: each takes one thread unless a test asks for more, and
idle threads don't spin while another process could run. Set here because OpenMP reads it when torch is imported.
"""

import os

import pytest

# Assertions in these helpers show what differs, as those in tests do.
pytest.register_assert_rewrite(
    "cli_runs", "cross_gradient_runs", "quadratic_runs", "simulator_runs", "small_training", "train_runs"
)

os.environ["PYTHONSAFEPATH"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
