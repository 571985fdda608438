"""`nuqjax.compress`: a tree alone, or with a function and some inputs that tell what its leaves are used for."""

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


def compress(
    params: Any,
    bits: int = 4,
    method: str = "knq",
    *,
    granularity="tensor",
    axis: int | Sequence[int] = -1,
    scale=None,
    codebook_format=None,
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
    """Compresses a parameter tree: the same tree, its large floating leaves as `CodebookArray`.

    A leaf is compressed if it is floating, has two or more axes (stack axes not counted) and at least `min_size`
    values, and gets smaller; `plan` shows the choice, the report gives the reason for every leaf left dense, and a
    `Rule` can overrule it. What is no parameter stays dense: Flax's other collections beside "params", and NNX
    variables that are no `Param`. Stacked layers need a `Rule` with `stack_axes`; a sub-tree that looks like some is
    named in a warning, in the plan and in the report. An array that stands at several places is compressed once, and
    the result stands at all of them. The input is never changed; leaves that stay dense are the caller's own arrays, so
    a later change in place of one that NumPy holds changes both trees. Leaves on the host, which NumPy holds or JAX on
    one CPU, are compressed by NumPy, and nothing is compiled for them. Under `jit` (and `jax.eval_shape`) everything
    works but what needs values: NaN cannot be reported, and `AutoQFormat` cannot choose.

    With `fn` and `batches`, some hundred inputs without labels, it is the outputs of the layers that are kept, not the
    weights: at 3 and 4 bits that decides whether a network survives. Each leaf is followed to where `fn` uses it; its
    indices are chosen with error feedback, its levels and scales refitted, both for what it multiplies there, and the
    offsets after it take up the rest (the parts are in `nuqjax.calibration`; guide: docs/calibration.md). Then
    `scale=None` stands for `"channel"` where a codebook is shared by channels (a rule with `scale=None` leaves scales
    out), and axes are those of the use: output axes where `axis` is −1, stack axes where a loop runs through a leaf. A
    fifth of the batches is held out: the report says how far outputs are from the float ones on those. With a `budget`
    each leaf has a width of its own: what each costs the outputs is measured on inputs that are held out, too.

    Args:
      params: any pytree of arrays: Flax linen variables, NNX modules and states, equinox modules, dicts.
      bits: index width, 1 to 8; a codebook has 2^bits levels.
      method: `"knq"` (global k-means optimum), `"enq"`, `"uniform"`, `"uniform_pow2"`, `"dfp"`, `"normal"`,
        `"quantile"` or `"pow2"`; see `nuqjax.fit`.
      granularity: which values share a codebook: `"tensor"`, `"channel"` (each output channel its own),
        `ChannelGroups(n)` (n neighbouring output channels) or `InputGroups(n)` (runs of n along the other axes of each
        output channel).
      axis: the output axis or axes of a leaf, stack axes not counted: −1 for Flax kernels, several for attention's
        `DenseGeneral`, 0 for `[out, in]` layouts.
      scale: None, `"channel"` or `InputGroups(n)`: the values of a channel (or of a run of n) are divided by their
        largest magnitude before a shared codebook is fitted, in such a way that the leaf's squared error is minimised.
      codebook_format: how levels are stored: None for the leaf's dtype, a floating dtype (such as `jnp.bfloat16` or
        `"float8_e4m3fn"`, into whose range levels saturate), a `QFormat`, or `AutoQFormat(word)`, which chooses each
        leaf's fraction bits to minimise its squared error. Indices are assigned to the rounded levels.
      keep_zero: one level is exactly 0, so that pruned weights stay pruned.
      rules: `Rule`s, or a single one; the first that matches a leaf's path sets its options.
      sensitivity: a tree like `params` of non-negative importances (missing leaves: every value counts the same): the
        squared error of each value is weighted by its own. Not with `fn`.
      tolerance: each `"knq"` fit is proven to be within this share of the least squared error of any levels, and the
        relative gap that is left is reported as `certificate`. None leaves the proof out, and what it costs: on one
        long row up to half the fit's time for 16 levels, on many rows of some thousand values twice it
        (`python -m experiments.benchmark_fit rows channels`); `nuqjax.fit` says what levels are then worth. Under
        `jit`, of arrays that several processes hold, or of levels fitted to `batches`, nothing is proven.
      min_size: leaves with fewer values stay dense.
      return_report: return `(cparams, Report)`; this report has the methods and certificates too.
      progress: show a progress bar; in a notebook `ipywidgets` draws it.
      fn: `fn(params, *inputs)`, any function that JAX can trace, such as `model.apply`.
      batches: inputs for it, each an array or a tuple of arrays: a sequence, or an iterable that can be gone through
        again.
      output: which of the outputs of `fn` is compared on the batches held out: a function of them; None takes the
        first array.
      budget: in place of `bits`: `"3bpw"` (bits a weight of all that is counted), bytes, or `"kl=0.05"` (nats of
        divergence of the outputs); leaves get 2 to 8 bits. The report has them as rules, and what they were predicted
        to cost.
      rate: in place of `bits`, for a file that `save(…, entropy_coding=True)` writes: `"2.5bpw"`, bits a weight of the
        coded file (its header not counted). Indices are chosen for the error and the length of their code together:
        half a bit a weight less than a budget's file at the same outputs, but 6 bits each in memory.

    Returns:
      The compressed tree, or with `return_report` the pair of it and its `Report`.

    Raises:
      ValueError: no leaf is an array, NaN or infinity in a leaf, an option out of range, an unknown method, a rule that
        matches nothing or is always overruled, a negative or misshaped sensitivity. The message names the leaf. With
        data: no batches, or an iterator; `fn` fails, uses no leaf, or gives what is not finite; a budget out of reach.

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


_RATED_BITS = 6  # in memory: so many levels that the rare ones among them do not matter


def _check_data(fn: Any, batches: Any, sensitivity: Any, options: Options, params: Any) -> None:
    call = "nuqjax.compress(params, bits=4, fn=model.apply, batches=batches)"
    if fn is None or batches is None:
        missing, given = ("fn", "batches") if fn is None else ("batches", "fn")
        raise ValueError(f"compress: {given} is given, but no {missing}: {call}")
    if not callable(fn) or callable(getattr(fn, "init", None)):
        raise ValueError(f"compress: fn is a {type(fn).__name__}, but a function fn(params, *inputs) is wanted: {call}")
    if sensitivity is not None:
        raise ValueError("compress: sensitivity and fn are both given: the batches tell what counts; give one of them")
    if options.method != "knq":
        raise ValueError(f'compress: method={options.method!r} with fn, but levels are fitted to data by "knq" only')
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError("compress: with fn and batches values are needed: call it outside of jit")
