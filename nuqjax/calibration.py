"""Compression with data: the parts behind `nuqjax.compress(params, fn=…, batches=…)`, each a pure function.

`Problem` and `Solution` are of one leaf, plain arrays; `shrunk` makes moments of few inputs fit to be trusted, and
`quantize` finds the levels, scales and indices of least output error.
"""

from nuqjax._src.calibration.problem import Problem, Solution, shrunk
from nuqjax._src.calibration.solver import quantize

__all__ = ["Problem", "Solution", "quantize", "shrunk"]
