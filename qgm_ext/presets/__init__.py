"""Comparisons that come with the package: one TOML file each, for ``qgm compare --preset NAME``.

The format is told in :class:`qgm_ext.experiments.comparison.Comparison`.
"""
