"""The algorithms by name: ``names()``, ``get("qg_dsgdm_n", lr=0.1, ...)``. One algorithm family, one file."""

from qgm_ext.algorithms.base import (
    AdamAlgorithm,
    Algorithm,
    MomentumAlgorithm,
    PackedMessage,
    Pass,
    RelayPass,
    State,
    Step,
    StepResult,
    check_number,
    get,
    get_class,
    identity_mixing,
    load_all,
    mean_mixing,
    names,
    register,
)

load_all(__name__, __path__)

__all__ = [
    "AdamAlgorithm",
    "Algorithm",
    "MomentumAlgorithm",
    "PackedMessage",
    "Pass",
    "RelayPass",
    "State",
    "Step",
    "StepResult",
    "check_number",
    "get",
    "get_class",
    "identity_mixing",
    "mean_mixing",
    "names",
    "register",
]
