"""Which options apply to which leaf: paths, precedence, inheritance and what is refused."""

import re
from dataclasses import fields
from typing import NamedTuple

import equinox as eqx
import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from nuqjax._src.compress.rules import INHERIT, Options, Rule, resolve
from nuqjax._src.leaf.paths import path_name

PATHS = ["encoder/layer_0/kernel", "encoder/layer_0/bias", "encoder/layer_1/kernel", "head/kernel"]


class Pair(NamedTuple):
    kernel: int
    bias: int


def paths_of(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_paths_join_the_keys_of_every_container():
    assert paths_of({"a": [1, {"b": 2}], "c": (3,), "d": Pair(4, 5)}) == ["a/0", "a/1/b", "c/0", "d/kernel", "d/bias"]


def test_paths_name_the_fields_of_modules():
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    assert paths_of({"head": linear}) == ["head/weight", "head/bias"]
    names = paths_of(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    assert [re.sub(r"/\W*value$", "", name) for name in names] == ["bias", "kernel"]


def test_a_single_leaf_has_an_empty_path_that_rules_can_match():
    assert paths_of(1) == [""]
    assert resolve([""], Options(), [Rule("^$", bits=2)])[0].bits == 2


def test_without_rules_the_options_are_those_given():
    options = Options(bits=3)
    assert resolve(PATHS, options, []) == [options] * len(PATHS)


def test_the_first_match_wins():
    resolved = resolve(PATHS, Options(bits=4), [Rule("head", bits=8), Rule("kernel", bits=2), Rule(".", bits=5)])
    assert [o.bits for o in resolved] == [2, 5, 2, 8]
    assert [o.rule for o in resolved] == ["kernel", ".", "kernel", "head"]


def test_what_a_rule_does_not_give_is_inherited():
    options = Options(bits=3, method="enq", granularity="channel", axis=0, keep_zero=True, min_size=7)
    (resolved,) = resolve(["head"], options, [Rule("head", method="uniform", stack_axes=1, skip=False)])
    expected = {"method": "uniform", "stack_axes": 1, "skip": False, "rule": "head"}
    assert vars(resolved) == vars(options) | expected


@pytest.mark.parametrize("given_value", [None, 0, False])
def test_none_and_zero_and_false_are_values_not_absence(given_value):
    (resolved,) = resolve(["head"], Options(scale="channel"), [Rule("head", scale=given_value)])
    assert resolved.scale is given_value


@given(
    st.lists(st.text("abc/", min_size=1, max_size=6), min_size=1, max_size=6, unique=True),
    st.lists(st.sampled_from(["a", "b", "c", "^a", "c$", "/", "a.b", "."]), max_size=4),
)
def test_resolve_agrees_with_its_definition(paths, patterns):
    """First match by `re.search`; an error exactly if some rule is no path's first match."""
    rules = [Rule(pattern, bits=1 + i) for i, pattern in enumerate(patterns)]
    first = [next((i for i, p in enumerate(patterns) if re.search(p, path)), None) for path in paths]
    if set(range(len(patterns))) <= set(first):
        bits = [o.bits for o in resolve(paths, Options(bits=8), rules)]
        assert bits == [8 if i is None else 1 + i for i in first]
    else:
        with pytest.raises(ValueError, match=r"matches none of|never applies"):
            resolve(paths, Options(bits=8), rules)


def test_a_rule_can_set_every_option_of_a_leaf():
    own = {"pattern", "skip", "stack_axes"}
    assert {f.name for f in fields(Rule)} - own == {f.name for f in fields(Options)} - {"skip", "stack_axes", "rule"}
    assert all(f.default is INHERIT for f in fields(Rule) if f.name not in own)


def test_the_repr_shows_what_is_given_and_can_be_evaluated():
    rule = Rule("head", bits=8, skip=False, scale=None)
    assert repr(rule) == "Rule('head', skip=False, bits=8, scale=None)"
    assert eval(repr(rule)) == rule


class TestRefusals:
    def test_a_pattern_that_is_no_regular_expression(self):
        with pytest.raises(ValueError, match=r"rule '\(head': not a regular expression"):
            Rule("(head")

    @pytest.mark.parametrize("stack_axes", [-1, 1.0, True, "1"])
    def test_stack_axes_that_are_no_count(self, stack_axes):
        with pytest.raises(ValueError, match=r"stack_axes=.* but 0 or more is wanted"):
            Rule("head", stack_axes=stack_axes)

    def test_a_rule_that_matches_nothing_names_the_nearest_paths(self):
        with pytest.raises(ValueError, match="matches none of the 4 leaves") as error:
            resolve(PATHS, Options(), [Rule("encoder/layer_2/kernel")])
        assert "'encoder/layer_0/kernel'" in str(error.value)
        assert "'encoder/layer_1/kernel'" in str(error.value)
        assert "head" not in str(error.value)

    def test_where_nothing_is_near_some_paths_are_shown(self):
        with pytest.raises(ValueError, match="'encoder/layer_0/kernel', 'encoder/layer_0/bias'"):
            resolve(PATHS, Options(), [Rule("zzz")])

    def test_an_empty_tree_has_no_paths_to_show(self):
        with pytest.raises(ValueError, match=r"matches none of the 0 leaves.*the tree has none"):
            resolve([], Options(), [Rule("head")])

    def test_a_rule_that_is_always_overruled_names_the_earlier_one(self):
        message = "rule 'head' never applies: 'head/kernel' .* the earlier rule 'kernel'"
        with pytest.raises(ValueError, match=message):
            resolve(PATHS, Options(), [Rule("kernel"), Rule("head")])

    def test_the_same_rule_twice_is_overruled_by_itself(self):
        rule = Rule("head")
        with pytest.raises(ValueError, match="never applies"):
            resolve(PATHS, Options(), [rule, rule])

    def test_what_is_no_rule(self):
        with pytest.raises(ValueError, match=r"rules hold 'head', but a list of nuqjax.Rule is wanted"):
            resolve(PATHS, Options(), ["head"])
