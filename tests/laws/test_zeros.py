"""Zeros, of which scales, spreads and steps are 0 too, raise no floating-point error and warn of none."""

import warnings

import numpy as np
import pytest

import nuqjax
from nuqjax import AutoQFormat, InputGroups, QFormat
from nuqjax._src.fit.methods import METHODS

NORMAL = np.random.default_rng(0).standard_normal((32, 48)).astype(np.float32)
ZEROS = {"all": np.s_[:], "rows": np.s_[3:9], "columns": np.s_[:, 5], "groups": np.s_[:16, :8]}


@pytest.mark.parametrize("scale", [None, "channel", InputGroups(16)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_no_floating_point_error(method, scale):
    """Whatever the error state of NumPy, which a user may set, and where warnings are errors."""
    for where in ZEROS.values():
        params = {"w": NORMAL.copy()}
        params["w"][where] = 0
        for codebook_format in (None, "float16", "float8_e4m3fn", QFormat(8, 4), AutoQFormat(8)):
            options = {"scale": scale, "codebook_format": codebook_format, "granularity": "channel"}
            with np.errstate(all="raise"), warnings.catch_warnings(action="error"):
                cparams = nuqjax.compress(params, 2, method, tolerance=None, **options)
                assert str(nuqjax.report(params, cparams))


def test_zeros_of_every_dtype_and_granularity():
    for dtype in ("float16", "bfloat16", "float32", "float8_e5m2"):
        for granularity in ("tensor", "channel", InputGroups(8)):
            for scale in (None, "channel"):
                params = {"w": np.zeros((32, 48), dtype)}
                with np.errstate(all="raise"), warnings.catch_warnings(action="error"):
                    cparams = nuqjax.compress(params, 4, granularity=granularity, scale=scale)
                    assert str(nuqjax.report(params, cparams))
                assert (np.asarray(nuqjax.decompress(cparams)["w"]) == 0).all()
