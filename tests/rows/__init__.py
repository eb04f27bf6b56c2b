"""What the tests know of every algorithm and every compiled rule: one family, one file.

A file holds ``ALGORITHMS``, rows by the names of algorithms, ``RULES``, rows by the names of rules, or both. Those of
all files are put together here; names without a row fail in test_algorithms.py and test_ops.py.
"""

import importlib
import pkgutil

from rows.base import AlgorithmRow, RuleRow

ALGORITHMS: dict[str, AlgorithmRow] = {}
RULES: dict[str, RuleRow] = {}
for _module in pkgutil.iter_modules(__path__):
    _file = importlib.import_module(f"rows.{_module.name}")
    ALGORITHMS.update(getattr(_file, "ALGORITHMS", {}))
    RULES.update(getattr(_file, "RULES", {}))
