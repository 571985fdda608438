"""What a scalar quantizer can reach on Gaussian and Laplacian sources: the tables beside the measured layers.

`lloyd_max_db`: the quantizer of least squared error (Lloyd 1982, Max 1960). `uniform_db`: the two's-complement grid
{−K/2, …, K/2 − 1} at its best step; `uniform_pow2_db`: at the best power-of-two step, on average over the source's
scale. All for sources of mean 0 and variance 1 and K = 2^bits levels, in `results/lloyd_max.json`, computed by
Newton's method in float64; `tests/experiments/paper/test_theory.py` integrates them anew.
"""

import json

from experiments.record.results import RESULTS

_TABLE = RESULTS / "lloyd_max.json"
KINDS = ("lloyd_max", "uniform", "uniform_pow2")


def reference_db(density: str, kind: str) -> dict[int, float]:
    """By bits, the SQNR in dB that is reached at best.

    Args:
      density: `"gauss"` or `"laplace"`.
      kind: one of `KINDS`.

    >>> round(reference_db("gauss", "lloyd_max")[4], 2)
    20.22
    """
    table = json.loads(_TABLE.read_text())[density][kind]
    return {int(bits): value for bits, value in table.items()}
