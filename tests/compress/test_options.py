"""`Options` is the one source of names and defaults: what users call writes them out, and differs from it nowhere."""

import inspect
from dataclasses import fields

import pytest

import nuqjax
from nuqjax import cli
from nuqjax._src.calibration import door
from nuqjax._src.cli.options import RULE_OPTIONS
from nuqjax._src.compress.rules import INHERIT, Options

OF_LEAVES = {"stack_axes", "skip", "rule"}  # only a rule says these
DEFAULTS = {field.name: field.default for field in fields(Options) if field.name not in OF_LEAVES}
FUNCTIONS = {"compress": set(), "plan": {"tolerance"}, "compress_checkpoint": set()}  # and what each has no use for


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_the_options_with_their_defaults(name):
    parameters = inspect.signature(getattr(nuqjax, name)).parameters
    wanted = {option: default for option, default in DEFAULTS.items() if option not in FUNCTIONS[name]}
    assert {option: parameters[option].default for option in wanted if option in parameters} == wanted


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_have_the_types_that_compress_gives_them(name):
    reference = inspect.signature(nuqjax.compress).parameters
    for option, parameter in inspect.signature(getattr(nuqjax, name)).parameters.items():
        if option in DEFAULTS:
            assert parameter.annotation == reference[option].annotation, option


def test_the_overloads_of_compress_take_what_compress_takes():
    """But for the report: it decides which overload applies."""
    parameters = inspect.signature(nuqjax.compress).parameters.values()
    keywords = {one.name: one.annotation for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert keywords == {**door._Keywords.__annotations__, "return_report": bool}


@pytest.mark.parametrize("holder", [Options, nuqjax.Rule])
def test_options_have_the_types_that_compress_gives_them_where_they_are_held(holder):
    reference = inspect.signature(nuqjax.compress).parameters
    held = {field.name: field.type for field in fields(holder) if field.name in DEFAULTS}
    assert held == {option: reference[option].annotation for option in DEFAULTS}


def test_a_rule_takes_every_option_and_inherits_it():
    rule = nuqjax.Rule("kernel")
    assert {field.name for field in fields(nuqjax.Rule)} == {field.name for field in fields(Options)} - {"rule"} | {
        "pattern"
    }
    assert {name for name in DEFAULTS if getattr(rule, name) is not INHERIT} == set()
    assert (rule.stack_axes, rule.skip) == (Options.stack_axes, Options.skip)


def test_the_command_line_has_the_options_with_their_defaults():
    given = vars(cli.parser().parse_args(["compress", "in", "out"]))
    given["axis"] = given.pop("output_axis")
    assert {name: given.get(name) for name in DEFAULTS} == DEFAULTS


def test_the_command_line_reads_every_option_of_a_rule():
    assert {key for key, _ in RULE_OPTIONS.values()} == {field.name for field in fields(Options)} - {"rule"}
