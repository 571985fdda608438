"""`nuqjax.compress`: compresses a tree by itself, or with a function and inputs that show how its leaves are used."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.core

from nuqjax._src.calibration.flow import calibrated
from nuqjax._src.calibration.programs import Programs
from nuqjax._src.calibration.widths import goal_of
from nuqjax._src.compress.compress import compress_tree
from nuqjax._src.compress.rules import Options, Rule
from nuqjax._src.leaf.qformat import CodebookFormat
from nuqjax._src.leaf.rows import Granularity, Scale


def compress(
    params: Any,
    bits: int = 4,
    method: str = "knq",
    *,
    granularity: Granularity = "tensor",
    axis: int | Sequence[int] = -1,
    scale: Scale = None,
    codebook_format: CodebookFormat = None,
    keep_zero: bool = False,
    rules: Rule | Sequence[Rule] = (),
    sensitivity: Any = None,
    tolerance: float | None = 1e-6,
    min_size: int = 256,
    return_report: bool = False,
    progress: bool = False,
    fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    budget: int | str | None = None,
    rate: str | None = None,
) -> Any:
    """Compresses a parameter tree: returns the same tree with its large floating leaves as `CodebookArray`.

    A leaf is compressed if it is floating, has two or more axes (stack axes not counted) and at least `min_size`
    values, and gets smaller. `plan` shows the choice, the report gives the reason for every leaf left dense, and a
    `Rule` can overrule it. Anything that is not a parameter stays dense: Flax collections other than "params", and NNX
    variables that are not `Param`. Stacked layers need a `Rule` with `stack_axes`; a warning, the plan and the report
    name any sub-tree that looks like stacked layers. An array that occurs in several places is compressed once, and all
    places share the result. The input is never changed. Leaves that stay dense are the caller's own arrays, so changing
    a NumPy array in place later changes both trees. Leaves on the host (NumPy arrays, or JAX arrays on one CPU) are
    compressed by NumPy, without compilation. Under `jit` and `jax.eval_shape` everything works except what needs
    values: NaN cannot be reported, and `AutoQFormat` cannot choose.

    With `fn` and `batches`, some hundred inputs without labels, compression preserves the outputs of the layers rather
    than the weights. At 3 and 4 bits this decides whether a network still works. Each leaf is followed to its uses in
    `fn`. For what it multiplies there, its indices are chosen with error feedback and its levels and scales are
    refitted. The offsets after it take up the remaining shift. (The parts are in `nuqjax.calibration`; the guide is
    docs/calibration.md.) With data, `scale=None` means `"channel"` where channels share a codebook (a rule with
    `scale=None` leaves scales out), and the use determines axes: output axes where `axis` is −1, stack axes where a
    loop slices a leaf. A fifth of the batches is held out: on these the report compares outputs with the float ones.
    They also decide whether leaves are compressed by their float inputs, or in the order of use by the inputs that
    compressed leaves leave them, which takes longer.
    With a `budget` each leaf gets its own width; its effect on the outputs is measured on held-out inputs, too.

    Args:
      params: any pytree of arrays: Flax linen variables, NNX modules and states, equinox modules, dicts.
      bits: index width, 1 to 8; a codebook has 2^bits levels.
      method: `"knq"` (global k-means optimum), `"enq"`, `"uniform"`, `"uniform_pow2"`, `"dfp"`, `"normal"`,
        `"quantile"` or `"pow2"`; see `nuqjax.fit`. With data, scales are refitted, and so are the levels of `"knq"`
        and `"enq"` each, and the middle and step of `"uniform"`; the levels of other methods stay as fitted.
      granularity: which values share a codebook: `"tensor"`, `"channel"` (one for each output channel),
        `ChannelGroups(n)` (n neighbouring output channels) or `InputGroups(n)` (runs of n along the other axes of each
        output channel).
      axis: the output axis or axes of a leaf, stack axes not counted: −1 for Flax kernels, several for attention's
        `DenseGeneral`, 0 for `[out, in]` layouts.
      scale: None, `"channel"` or `InputGroups(n)`: the values of a channel (or of a run of n) are divided by their
        largest magnitude. A shared codebook is then fitted so that the leaf's squared error is minimised.
      codebook_format: how levels are stored: None for the leaf's dtype, a floating dtype (such as `jnp.bfloat16` or
        `"float8_e4m3fn"`, to whose range levels saturate), a `QFormat`, or `AutoQFormat(word)`, which chooses each
        leaf's fraction bits to minimise its squared error. Indices are assigned to the rounded levels.
      keep_zero: one level is exactly 0, so that pruned weights stay pruned.
      rules: `Rule`s, or a single one; the first that matches a leaf's path sets its options.
      sensitivity: a tree like `params` of non-negative importances; each weights the squared error of its value. In a
        missing leaf every value counts the same. Not allowed with `fn`.
      tolerance: each `"knq"` fit is proven to be within this share of the least squared error of any levels, and the
        remaining relative gap is reported as `certificate`. None skips the proof and its cost: on one long row up to
        half the fit's time for 16 levels, on many rows of some thousand values twice the fit's time
        (`python -m experiments.speed.fit rows channels`); `nuqjax.fit` describes the quality of levels then.
        Nothing is proven under `jit`, for arrays held by several processes, or for levels fitted to `batches`.
      min_size: leaves with fewer values stay dense.
      return_report: return `(cparams, Report)`; this report also has the methods and certificates.
      progress: show a progress bar; in a notebook `ipywidgets` draws it.
      fn: `fn(params, *inputs)`, any function that JAX can trace, such as `model.apply`.
      batches: inputs for `fn`, each an array or a tuple of arrays: a sequence, or an iterable that can be iterated over
        more than once.
      output: a function that selects, from the outputs of `fn`, the one to compare on held-out batches; None takes the
        first array.
      budget: in place of `bits`: `"3bpw"` (bits a weight, everything counted), bytes, or `"kl=0.05"` (nats of
        divergence of the outputs). Leaves get 2 to 8 bits. The report lists them as rules, with the predicted
        divergence.
      rate: in place of `bits`, for a file that `save(…, entropy_coding=True)` writes: `"2.5bpw"`, bits a weight of the
        coded file (its header not counted). Indices are chosen by error and code length together: at the same outputs
        the file is small, but each index takes 6 bits in memory.

    Returns:
      The compressed tree; with `return_report`, the compressed tree and its `Report`.

    Raises:
      ValueError: no leaf is an array, NaN or infinity in a leaf, an option out of range, an unknown method, a rule that
        matches nothing or is always overruled, a negative or misshaped sensitivity. The message names the leaf. With
        data: no batches, or an iterator; `fn` fails, uses no leaf, or returns values that are not finite; a budget that
        cannot be met.

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64), "bias": jnp.zeros(64)}
    >>> nuqjax.compress(params, bits=4)["kernel"]
    CodebookArray(float32[64, 64], bits=4, granularity='tensor', 2112 bytes)

    With data:

    >>> fn = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> batches = [jnp.sin(jnp.arange(1024.0) * n).reshape(16, 64) for n in (1, 2, 3)]
    >>> cparams, report = nuqjax.compress(params, bits=4, fn=fn, batches=batches, return_report=True)
    >>> cparams["kernel"].scale.shape, report.leaves[1].method
    ((64, 1), 'knq+feedback+refit')
    """
    options = Options(
        bits=bits, method=method, granularity=granularity, axis=axis, scale=scale, codebook_format=codebook_format,
        keep_zero=keep_zero, tolerance=tolerance, min_size=min_size,
    )  # fmt: skip
    if fn is None and batches is None:
        for name, given in (("output", output), ("budget", budget), ("rate", rate)):
            if given is not None:
                raise ValueError(f"compress: {name}= needs data: compress(params, {name}=…, fn=…, batches=…)")
        return compress_tree(params, options, rules, sensitivity, return_report=return_report, progress=progress)
    _check_data(fn, batches, sensitivity, options, params)
    goal = goal_of(budget, rate)
    options = options if rate is None else replace(options, bits=_RATED_BITS)
    assert fn is not None
    programs = Programs(fn, params, "compress", output)
    cparams, report, notes = calibrated(programs, batches, options, rules, goal, progress)
    for note in notes:
        warnings.warn(f"compress: {note}", stacklevel=2)
    return (cparams, report()) if return_report else cparams


_RATED_BITS = 6  # index width in memory: with so many levels, further ones would be too rarely used to matter


def _check_data(fn: Any, batches: Any, sensitivity: Any, options: Options, params: Any) -> None:
    call = "nuqjax.compress(params, bits=4, fn=model.apply, batches=batches)"
    if fn is None or batches is None:
        missing, given = ("fn", "batches") if fn is None else ("batches", "fn")
        raise ValueError(f"compress: {given} is given, but no {missing}: {call}")
    if not callable(fn) or callable(getattr(fn, "init", None)):
        raise ValueError(f"compress: fn is a {type(fn).__name__}, but a function fn(params, *inputs) is wanted: {call}")
    if sensitivity is not None:
        raise ValueError(
            "compress: sensitivity and fn are both given, but batches already weigh what counts; give one of them"
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError("compress: fn and batches need values: call it outside jit")
