"""Compression with data: the parts behind `nuqjax.compress(params, fn=…, batches=…)`, each a pure function.

`moments` finds what each leaf multiplies, and `correct_bias` corrects the offsets after compressed leaves: both know
the model, through the function. `sensitivity` measures what each leaf costs the outputs at each width, and `allocate`
gives each its width within a budget.

`Problem` and `Solution` are of one leaf, plain arrays; `shrunk` makes moments of few inputs fit to be trusted, and
`quantize` finds the levels, scales and indices of least output error.
"""

from nuqjax._src.calibration.biases import correct_bias
from nuqjax._src.calibration.problem import Problem, Solution, shrunk
from nuqjax._src.calibration.second_moments import LeafMoments, Moments, moments
from nuqjax._src.calibration.solver import quantize
from nuqjax._src.calibration.widths import Allocation, allocate, sensitivity

__all__ = [
    "Allocation",
    "LeafMoments",
    "Moments",
    "Problem",
    "Solution",
    "allocate",
    "correct_bias",
    "moments",
    "quantize",
    "sensitivity",
    "shrunk",
]
