"""What is refused, and that each message names the leaf, what was got and what is wanted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups, QFormat, Rule


def params():
    return {
        "conv": {"kernel": np.ones((4, 8, 16), np.float32), "bias": np.ones(16, np.float32)},
        "step": np.arange(512, dtype=np.int32).reshape(16, 32),
    }


def refused(message, tree=None, **options):
    """Both compress and, for what values do not decide, plan refuse it with this message."""
    options = {"method": "normal"} | options
    with pytest.raises(ValueError, match=message):
        nuqjax.compress(params() if tree is None else tree, **options)
    if "sensitivity" not in options and "tolerance" not in options and tree is None:
        with pytest.raises(ValueError, match=message):
            nuqjax.plan(params(), **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, lambda a: jnp.asarray(a, jnp.bfloat16)])
def test_nan_and_infinity_are_counted_and_the_first_is_found(bad, convert):
    tree = params()
    tree["conv"]["kernel"][1, 2, 3] = bad
    tree["conv"]["kernel"][2:, 0, 0] = np.nan
    tree["conv"]["kernel"] = convert(tree["conv"]["kernel"])
    refused(rf"^conv/kernel: 3 of 512 values are NaN or infinite, the first {bad} at \[1, 2, 3\]", tree)


def test_nan_in_a_leaf_that_stays_dense_is_nobodys_business():
    tree = params()
    tree["conv"]["bias"][0] = np.nan
    assert nuqjax.compress(tree, method="normal")["conv"]["bias"] is tree["conv"]["bias"]


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, "4", None, True])
def test_bits(bits):
    refused(re.escape(f"compress: bits={bits!r}, but a whole number from 1 to 8 is wanted"), bits=bits)
    rules = [Rule("kernel", bits=bits)]
    refused(re.escape(f"conv/kernel: bits={bits!r}, but a whole number from 1 to 8 is wanted"), rules=rules)


@pytest.mark.parametrize("method", ["kmeans", "KNQ", None])
def test_an_unknown_method_lists_the_known(method):
    known = "known: knq, enq, uniform, uniform_pow2, dfp, normal, quantile, pow2"
    refused(f"compress: unknown method {method!r}; {known}", method=method)
    refused(f"conv/kernel: unknown method {method!r}; {known}", rules=[Rule("kernel", method=method)])
    with pytest.raises(ValueError, match=known):
        nuqjax.fit(jnp.ones((1, 4)), 2, method)


def test_a_misspelt_rule_shows_the_near_misses():
    refused("rule 'conv/kernle' matches none of the 3 leaves; the nearest paths are 'conv/kernel'",
            rules=[Rule("conv/kernle", bits=8)])  # fmt: skip


def test_a_rule_that_never_applies_shows_what_overrules_it():
    rules = [Rule("conv"), Rule("bias", skip=True)]
    refused("rule 'bias' never applies: 'conv/bias' .* earlier rule 'conv'", rules=rules)


@pytest.mark.parametrize("granularity", ["row", None, 3, ("channel", 4)])
def test_granularity(granularity):
    wanted = re.escape(f'granularity {granularity!r}, but it must be "tensor", "channel", ChannelGroups(n) or InputGr')
    refused(f"compress: {wanted}", granularity=granularity)
    refused(f"conv/kernel: {wanted}", rules=[Rule("kernel", granularity=granularity)])


@pytest.mark.parametrize("kind", [ChannelGroups, InputGroups])
@pytest.mark.parametrize("size", [0, -3, 2.0, True, None])
def test_a_group_size_below_one(kind, size):
    message = rf"{kind.__name__}: a group size of {size!r}, but it must be a whole number, 1 or more"
    with pytest.raises(ValueError, match=message):
        kind(size)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (3, "output axis 3, but the array has 3 axes"),
        ((0, -4), "output axis -4, but the array has 3 axes"),
        ((0, -3), r"output axes \(0, -3\) name an axis twice"),
        ("x", "output axis 'x'"),
        (None, "output axis None"),
        (1.0, "output axis 1.0"),
    ],
    ids=str,
)
def test_axis(axis, message):
    refused(rf"conv/kernel \(shape \(4, 8, 16\)\): {message}", axis=axis)
    refused(rf"conv/kernel \(shape \(4, 8, 16\)\): {message}", rules=[Rule("kernel", axis=axis)])


@pytest.mark.parametrize("scale", ["tensor", ChannelGroups(3), 64, True, np.ones(3), "Channel"], ids=str)
def test_scale(scale):
    wanted = re.escape(f'scale={scale!r}, but None, "channel" or InputGroups(n) is wanted')
    refused(f"compress: {wanted}", scale=scale)
    refused(f"conv/kernel: {wanted}", rules=[Rule("kernel", scale=scale)])


@pytest.mark.parametrize(
    "codebook_format", ["float9", jnp.int8, "bool", 8, object()], ids=lambda x: getattr(x, "__name__", type(x).__name__)
)
def test_codebook_format(codebook_format):
    wanted = "None, a floating dtype, a QFormat or an AutoQFormat is wanted"
    refused(f"compress: codebook_format=.*, but {wanted}", codebook_format=codebook_format)
    refused(f"conv/kernel: codebook_format=.*, but {wanted}", rules=[Rule("kernel", codebook_format=codebook_format)])


@pytest.mark.parametrize("codebook_format", [QFormat(25, 0), AutoQFormat(32)], ids=str)
def test_words_that_levels_cannot_hold_exactly(codebook_format):
    message = re.escape(f"codebook_format={codebook_format}, but levels decode exactly up to 24 bits only")
    refused(message, codebook_format=codebook_format)


@pytest.mark.parametrize("min_size", [-1, 2.5, None])
def test_min_size(min_size):
    refused(f"min_size={min_size!r}, but a whole number, 0 or more, is wanted", min_size=min_size)


@pytest.mark.parametrize("tolerance", [-1e-6, float("nan")])
def test_tolerance(tolerance):
    refused(f"tolerance={tolerance!r}, but a number, 0 or more, or None is wanted", tolerance=tolerance)


def test_stack_axes_beyond_the_shape():
    message = r"conv/kernel: stack_axes=4, but the leaf has shape \(4, 8, 16\)"
    refused(message, rules=[Rule("kernel", stack_axes=4)])


@pytest.mark.parametrize(
    ("path", "leaf", "kind"),
    [
        ("step", np.ones((16, 32), np.int32), "dtype int32 is not floating"),
        ("flag", np.ones((16, 32), bool), "dtype bool is not floating"),
        ("key", jax.random.key(0), "dtype key<fry> is not floating"),
        ("rate", 0.5, "it is a float, not an array"),
    ],
)
def test_what_cannot_be_compressed_raises_only_if_a_rule_insists(path, leaf, kind):
    _, report = nuqjax.compress({path: leaf}, return_report=True)
    assert kind.removeprefix("its ").split(", ")[-1] in report.leaves[0].reason
    refused(f"^{path}: rule '{path}' has skip=False, but {kind}", {path: leaf}, rules=[Rule(path, skip=False)])


def test_insisting_on_what_is_compressed_already():
    once = nuqjax.compress(params(), method="normal")
    refused(
        "^conv/kernel: rule 'kernel' has skip=False, but it is already a CodebookArray",
        once,
        rules=[Rule("kernel", skip=False)],
    )


class TestSensitivity:
    def given(self, value, place=(1, 2, 3)):
        importance = np.ones((4, 8, 16), np.float32)
        importance[place] = value
        return {"conv": {"kernel": importance}}

    @pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
    @pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
    def test_negative_or_not_finite(self, value, convert):
        message = rf"conv/kernel: 1 sensitivities are negative, NaN or infinite, the first {value} at \[1, 2, 3\]"
        refused(message, sensitivity=jax.tree.map(convert, self.given(value)))

    def test_negative_where_it_does_not_matter_is_refused_too(self):
        refused(r"conv/bias: 16 sensitivities are negative", sensitivity={"conv": {"bias": -np.ones(16)}})

    def test_misshaped(self):
        message = r"conv/kernel: sensitivity of shape \(8, 16\), but the leaf has shape \(4, 8, 16\)"
        refused(message, sensitivity={"conv": {"kernel": np.ones((8, 16))}})
        refused(r"conv/kernel: sensitivity of shape \(\)", sensitivity={"conv": {"kernel": 1.0}})
        refused(r"conv/bias: sensitivity of shape \(3,\)", sensitivity={"conv": {"bias": np.ones(3)}})

    def test_of_a_leaf_that_is_not_there(self):
        message = (
            "sensitivity has a leaf 'conv/kernle' that the parameters do not have; the nearest paths are 'conv/kernel'"
        )
        refused(message, sensitivity={"conv": {"kernle": np.ones((4, 8, 16))}})

    def test_zero_everywhere_works(self):
        for method in ("enq", "normal", "quantile"):
            tree = nuqjax.compress(params(), method=method, sensitivity=self.given(0, place=...))
            assert np.isfinite(np.asarray(tree["conv"]["kernel"])).all()


class TestCodebooks:
    def test_missing_levels(self):
        cparams = nuqjax.compress(params(), method="normal")
        with pytest.raises(ValueError, match="with_codebooks: no levels for conv/kernel"):
            nuqjax.with_codebooks(cparams, {"conv": {}})

    def test_misshaped_levels(self):
        cparams = nuqjax.compress(params(), 2, "normal")
        message = r"with_codebooks: conv/kernel: levels of shape \(4,\), but the leaf has \(1, 4\)"
        with pytest.raises(ValueError, match=message):
            nuqjax.with_codebooks(cparams, {"conv": {"kernel": jnp.ones(4)}})

    def test_levels_of_a_leaf_that_is_not_there(self):
        cparams = nuqjax.compress(params(), 2, "normal")
        levels = {"conv": {"kernel": jnp.ones((1, 4)), "kernle": jnp.ones((1, 4))}}
        with pytest.raises(
            ValueError, match="with_codebooks: levels for 'conv/kernle', which is not a compressed leaf"
        ):
            nuqjax.with_codebooks(cparams, levels)
