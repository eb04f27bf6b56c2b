"""The algorithms by name: ``names()``, ``get("qg_dsgdm_n", lr=0.1, ...)``. One algorithm family, one file."""

from qgm_ext.algorithms.base import (
    Algorithm,
    Pass,
    RelayPass,
    Step,
    check_number,
    get,
    get_class,
    load_all,
    names,
    register,
)

load_all(__name__, __path__)

__all__ = ["Algorithm", "Pass", "RelayPass", "Step", "check_number", "get", "get_class", "names", "register"]
