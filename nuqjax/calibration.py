"""Compression with data: the parts of `nuqjax.compress(params, fn=…, batches=…)`, each a pure function.

`moments` computes second moments of the values that each leaf multiplies, and `correct_bias` corrects the biases after
compressed leaves; both take the model as a function. `sensitivity` measures the output error that each leaf causes at
each width, and `allocate` chooses each leaf's width within a budget.

`Problem` and `Solution` hold plain arrays for one leaf. `shrunk` regularizes moments that come from few inputs, and
`quantize` finds the levels, scales and indices with the least output error; two of its steps stand alone, too:
`error_feedback` chooses indices for given levels, and `refit` improves a given solution. `target` gives the weights to
quantize where a layer's inputs are no longer the float ones, because layers before it are compressed.
"""

from nuqjax._src.calibration.biases import correct_bias
from nuqjax._src.calibration.parts import error_feedback, refit
from nuqjax._src.calibration.problem import Problem, Solution, shrunk, target
from nuqjax._src.calibration.refine import Refined, refine
from nuqjax._src.calibration.second_moments import LeafMoments, Moments, moments
from nuqjax._src.calibration.solver import quantize
from nuqjax._src.calibration.widths import Allocation, allocate, sensitivity

__all__ = [
    "Allocation",
    "LeafMoments",
    "Moments",
    "Problem",
    "Refined",
    "Solution",
    "allocate",
    "correct_bias",
    "error_feedback",
    "moments",
    "quantize",
    "refine",
    "refit",
    "sensitivity",
    "shrunk",
    "target",
]
