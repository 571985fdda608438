"""One way to compress a network, in the words of the command line, and what they mean to `nuqjax.compress`."""

import argparse
import dataclasses
import itertools
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import nuqjax

_GROUPS = {"channel_groups": nuqjax.ChannelGroups, "input_groups": nuqjax.InputGroups}
_GRANULARITIES = "tensor, channel, channel_groups:N, input_groups:N"
_SCALES = "none, channel, input_groups:N"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How every leaf is compressed.

    Attributes:
      method: a method of `nuqjax.compress`.
      bits: index width.
      granularity: `tensor`, `channel`, `channel_groups:N` or `input_groups:N`.
      scale: `none`, `channel` or `input_groups:N`.
      codebook_format: a floating dtype's name, or `fixed:N` for N-bit words whose fraction bits fit each leaf.
      rules: each a path pattern followed by `option=value` words.
    """

    method: str = "knq"
    bits: int = 4
    granularity: str = "tensor"
    scale: str = "none"
    codebook_format: str = "float32"
    rules: tuple[tuple[str, ...], ...] = ()

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `nuqjax.compress`.

        Raises:
          ValueError: a word that means nothing; the message lists what is known.
        """
        return {
            "method": self.method,
            "bits": self.bits,
            "granularity": parse_granularity(self.granularity),
            "scale": parse_scale(self.scale),
            "codebook_format": parse_format(self.codebook_format),
            "rules": [parse_rule(words) for words in self.rules],
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Setting":
        """The setting whose `dataclasses.asdict` was written to JSON."""
        rules = tuple(tuple(words) for words in fields["rules"])
        return cls(**{**fields, "rules": rules})


def product(
    methods: Sequence[str],
    bits: Sequence[int],
    granularities: Sequence[str] = ("tensor",),
    scales: Sequence[str] = ("none",),
    formats: Sequence[str] = ("float32",),
    rules: Sequence[Sequence[str]] = (),
) -> list[Setting]:
    """Every combination, bits running fastest; all under the same rules.

    >>> [setting.bits for setting in product(["knq"], [4, 8])]
    [4, 8]
    """
    frozen = tuple(tuple(words) for words in rules)
    return [
        Setting(method, width, granularity, scale, codebook_format, frozen)
        for granularity, scale, codebook_format, method, width in itertools.product(
            granularities, scales, formats, methods, bits
        )
    ]


def listed(text: str) -> list[str]:
    """The words of an option that takes a list, with commas.

    >>> listed("knq,enq")
    ['knq', 'enq']
    """
    return [word for word in text.split(",") if word]


def parse_granularity(text: str) -> Any:
    """A granularity of `nuqjax.compress`.

    >>> parse_granularity("channel_groups:8")
    ChannelGroups(size=8)
    """
    return text if text in ("tensor", "channel") else _parse_groups(text, "granularity", _GRANULARITIES)


def parse_scale(text: str) -> Any:
    """A scale of `nuqjax.compress`; `none` is None."""
    if text in ("none", "channel"):
        return None if text == "none" else text
    if text.startswith("channel_groups"):
        raise ValueError(f"unknown scale {text!r}: the known are {_SCALES}")
    return _parse_groups(text, "scale", _SCALES)


def _parse_groups(text: str, what: str, known: str) -> Any:
    name, _, size = text.partition(":")
    if name not in _GROUPS or not size.isdigit():
        raise ValueError(f"unknown {what} {text!r}: the known are {known}")
    return _GROUPS[name](int(size))


def parse_format(text: str) -> Any:
    """A codebook format of `nuqjax.compress`.

    >>> parse_format("bfloat16")
    dtype(bfloat16)
    >>> parse_format("fixed:8")
    AutoQFormat(word=8, signed=True)
    """
    kind, _, word = text.partition(":")
    if kind == "fixed" and word.isdigit():
        return nuqjax.AutoQFormat(int(word))
    try:
        dtype = jnp.dtype(text)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"unknown codebook format {text!r}: known are floating dtypes (float32, bfloat16, …) and fixed:N"
        )
    return dtype


_RULE_OPTIONS = {
    "bits": int,
    "method": str,
    "granularity": parse_granularity,
    "scale": parse_scale,
    "codebook_format": parse_format,
    "min_size": int,
    "skip": lambda text: {"true": True, "false": False}[text.lower()],
    "keep_zero": lambda text: {"true": True, "false": False}[text.lower()],
}


def parse_rule(words: Sequence[str]) -> nuqjax.Rule:
    """A rule from its pattern and `option=value` words.

    >>> parse_rule(["Dense_0/kernel", "bits=8", "granularity=channel"])
    Rule('Dense_0/kernel', bits=8, granularity='channel')
    """
    pattern, *assignments = words
    options = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in _RULE_OPTIONS:
            raise ValueError(f"rule {pattern!r}: unknown option {assignment!r}: known are {', '.join(_RULE_OPTIONS)}")
        try:
            options[name] = _RULE_OPTIONS[name](value)
        except (ValueError, KeyError) as error:
            raise ValueError(f"rule {pattern!r}: {assignment!r} cannot be read: {error}") from error
    return nuqjax.Rule(pattern, **options)


def command_of(
    module: str, args: argparse.Namespace, parser: argparse.ArgumentParser, without: Collection[str] = ("data", "json")
) -> str:
    """The command line that measures the same: all options but the defaults, and those that differ between machines.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--bits", type=listed, default=["4"]), parser.add_argument("--json")
    >>> command_of("experiments.studies.accuracy", parser.parse_args(["--bits", "3,2", "--json", "here"]), parser)
    'python -m experiments.studies.accuracy --bits 3,2'
    """
    words = ["python", "-m", module]
    for name, value in vars(args).items():
        if name not in without and value != parser.get_default(name):
            kept = ",".join(value) if isinstance(value, list) else value
            kept = value.name if name == "weights" and isinstance(value, Path) else kept
            words += ["--" + name.replace("_", "-"), str(kept)]
    return shlex.join(words)
