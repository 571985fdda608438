"""Plots of a report's leaves, and of one layer's weights with its levels; needs matplotlib (the `plot` extra)."""

from nuqjax._src.report.plot import plot_levels, plot_report

__all__ = ["plot_levels", "plot_report"]
