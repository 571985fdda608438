"""Words of the command line mean what they say."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

import nuqjax
from experiments.record.settings import Setting, parse_format, parse_granularity, parse_rule, parse_scale, product


def test_a_setting_becomes_the_options_of_compress():
    setting = Setting("enq", 5, "input_groups:16", "channel", "bfloat16", (("kernel$", "bits=8"),))
    assert setting.options() == {
        "method": "enq",
        "bits": 5,
        "granularity": nuqjax.InputGroups(16),
        "scale": "channel",
        "codebook_format": jnp.dtype(jnp.bfloat16),
        "rules": [nuqjax.Rule("kernel$", bits=8)],
    }


def test_a_setting_survives_json():
    setting = Setting(rules=(("a/b", "bits=8", "skip=false"), ("c",)))
    assert Setting.from_dict(json.loads(json.dumps(dataclasses.asdict(setting)))) == setting


def test_the_product_holds_every_combination_once():
    settings = product(["knq", "enq"], [3, 4, 5], ["tensor", "channel"], ["none", "channel"], ["float32"])
    assert len(settings) == len(set(settings)) == 24
    assert [s.bits for s in settings[:3]] == [3, 4, 5]


def test_a_rule_takes_every_option_and_may_insist():
    rule = parse_rule(
        ["kernel$", "skip=false", "granularity=channel_groups:4", "scale=none", "codebook_format=fixed:8"]
    )
    assert rule == nuqjax.Rule(
        "kernel$",
        skip=False,
        granularity=nuqjax.ChannelGroups(4),
        scale=None,
        codebook_format=nuqjax.AutoQFormat(8),
    )


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_granularity, "layer", "unknown granularity 'layer': the known are tensor, channel, channel_groups:N"),
        (parse_granularity, "channel_groups", "unknown granularity"),
        (parse_granularity, "input_groups:x", "unknown granularity"),
        (parse_scale, "tensor", "unknown scale 'tensor': the known are none, channel, input_groups:N"),
        (parse_scale, "channel_groups:4", "unknown scale"),
        (parse_format, "float33", "unknown codebook format 'float33'"),
        (parse_format, "int8", "unknown codebook format 'int8'"),
        (lambda text: parse_rule(["a", text]), "bit=4", "rule 'a': unknown option 'bit=4': known are bits, method"),
        (lambda text: parse_rule(["a", text]), "bits=four", "rule 'a': 'bits=four' cannot be read"),
        (lambda text: parse_rule(["a", text]), "skip=maybe", "rule 'a': 'skip=maybe' cannot be read"),
    ],
)
def test_what_means_nothing_is_an_error(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
