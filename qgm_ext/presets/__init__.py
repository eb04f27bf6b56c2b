"""Comparisons that come with the package: one TOML file each, for ``qgm compare --preset NAME``.

The format is told in :class:`qgm_ext.experiments.comparison.Comparison`.
"""

from importlib import resources

__all__ = ["names"]


def names() -> list[str]:
    """What there is.

    Example:
        >>> "paper-small" in names()
        True
    """
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))
