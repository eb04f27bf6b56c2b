"""Plugins: modules and files of other people, imported so that they register algorithms, data sets and models."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["load_plugins"]


def load_plugins(plugins: Iterable[str]) -> None:
    """Import modules, or files that end in .py, which register algorithms, data sets and models of their own.

    Raises:
        ValueError: if one can't be imported; names it.
    """
    for plugin in plugins:
        try:
            if plugin.endswith(".py"):
                _import_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except (Exception, SystemExit) as error:  # whatever a stranger's file raises
            raise ValueError(f"plugin {plugin} can't be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    name = f"qgm_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
