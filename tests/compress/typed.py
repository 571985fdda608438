"""What a type checker sees of `compress`, `fit` and `assign`: `make types` checks this file, and nothing runs it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import jax
import numpy as np

import nuqjax

PARAMS: dict[str, Any] = {}


def check(flag: bool) -> None:
    """Each call has the type that its flag gives it."""
    assert_type(nuqjax.compress(PARAMS, 4), Any)
    assert_type(nuqjax.compress(PARAMS, return_report=False), Any)
    assert_type(nuqjax.compress(PARAMS, scale="channel", return_report=True), tuple[Any, nuqjax.Report])
    assert_type(nuqjax.compress(PARAMS, return_report=flag), Any | tuple[Any, nuqjax.Report])
    nuqjax.compress(PARAMS, scael="channel")  # pyright: ignore[reportCallIssue]


def check_arrays(rows: np.ndarray, other: jax.Array) -> None:
    """Arrays of NumPy are taken as those of JAX are."""
    assert_type(nuqjax.fit(rows, 4, weights=other), nuqjax.Fit)
    assert_type(nuqjax.assign(rows, nuqjax.fit(other, 4, mask=rows).levels), jax.Array)
