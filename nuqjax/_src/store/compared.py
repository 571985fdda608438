"""The report of a compressed tree beside the tree it came from, with the bytes of the files that it would take."""

from collections.abc import Mapping
from typing import Any

import jax

from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.report.report import Report, report_leaf
from nuqjax._src.store.store import file_sizes


def report(params: Any, cparams: Any) -> Report:
    """Compares a compressed tree with the tree it came from.

    Methods and certificates are not stored in a compressed tree: `compress(…, return_report=True)` reports them.

    Args:
      params: the dense tree.
      cparams: the tree that `compress` made from it.

    Returns:
      A `Report`. Sizes are those of the arrays in memory and of the files that `save` would write; SQNR and errors are
      computed in float64 on the host.

    Raises:
      ValueError: the trees differ in structure, or a leaf in shape.

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"kernel": jnp.arange(1024.0).reshape(32, 32)}
    >>> r = report(params, nuqjax.compress(params, bits=4))
    >>> r.total["nbytes_before"], r.total["nbytes_after"]
    (4096, 576)
    >>> r.nbytes_saved > r.total["nbytes_after"]  # with a header
    True
    """
    return build_report(params, cparams, {}, {})


def build_report(
    params: Any,
    cparams: Any,
    reasons: Mapping[str, str],
    fits: Mapping[str, tuple[str, float | None]],
    notes: tuple[str, ...] = (),
) -> Report:
    """Builds a report with what only `compress` knows: by path, why a leaf is dense, or its method and certificate."""
    before, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_codebook_array)
    after, compressed_structure = jax.tree_util.tree_flatten_with_path(cparams, is_leaf=is_codebook_array)
    if structure != compressed_structure:
        raise ValueError(f"report: the trees differ: {structure} and {compressed_structure}")
    leaves = []
    for (path, dense), (_, leaf) in zip(before, after, strict=True):
        name = path_name(path)
        leaves.append(report_leaf(name, dense, leaf, reasons.get(name), *fits.get(name, (None, None))))
    plain, coded = file_sizes(cparams) or (None, None)
    return Report(tuple(leaves), notes, nbytes_saved=plain, nbytes_saved_coded=coded)
