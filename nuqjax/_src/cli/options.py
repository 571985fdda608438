"""Reads options of the command line from their texts."""

import argparse
import importlib
import os
import re
import sys
from typing import Any

import jax.numpy as jnp

import nuqjax
from nuqjax._src.leaf.qformat import CodebookFormat
from nuqjax._src.leaf.rows import Granularity, Scale

_GROUPS = {"channels": nuqjax.ChannelGroups, "inputs": nuqjax.InputGroups}


def granularity(text: str) -> Granularity:
    """Reads `tensor`, `channel`, `channels/N` or `inputs/N`.

    >>> granularity("channels/8")
    ChannelGroups(size=8)
    """
    if text in ("tensor", "channel"):
        return text
    kind, _, size = text.partition("/")
    if kind not in _GROUPS or not size.isdigit() or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, but tensor, channel, channels/N or inputs/N is wanted")
    return _GROUPS[kind](int(size))


def scale(text: str) -> Scale:
    """Reads `none`, `channel` or `inputs/N`."""
    if text == "none":
        return None
    if text == "channel":
        return "channel"
    found = granularity(text) if text.startswith("inputs/") else None
    if isinstance(found, nuqjax.InputGroups):
        return found
    raise argparse.ArgumentTypeError(f"{text!r}, but none, channel or inputs/N is wanted")


def codebook_format(text: str) -> CodebookFormat:
    """Reads a floating dtype's name, fixed point as `fixed/WORD` or `fixed/WORD/FRAC`, or `none` for the leaf's dtype.

    >>> codebook_format("fixed/8/6")
    QFormat(word=8, frac=6, signed=True)
    """
    if text == "none":
        return None
    kind, *numbers = text.split("/")
    try:
        if kind == "fixed" and len(numbers) in (1, 2):
            word, *frac = map(int, numbers)
            return nuqjax.QFormat(word, frac[0]) if frac else nuqjax.AutoQFormat(word)
        if not numbers and jnp.issubdtype(jnp.dtype(kind), jnp.floating):
            return jnp.dtype(kind)
    except (ValueError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, but a floating dtype, fixed/WORD, fixed/WORD/FRAC or none is wanted")


def tolerance(text: str) -> float | None:
    """Reads a number or `none`."""
    try:
        return None if text == "none" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, but a number or none is wanted") from error


def function(text: str) -> Any:
    """Imports the function `MODULE:FUNCTION`; the current folder is searched for the module, too.

    >>> function("math:sqrt")(4.0)
    2.0
    """
    module, _, name = text.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}, but MODULE:FUNCTION is wanted: {error}") from error
    return found


def budget(text: str) -> int | str:
    """Reads a number of bytes; other text is left to `nuqjax.compress`.

    >>> budget("2000000"), budget("3bpw")
    (2000000, '3bpw')
    """
    return int(text) if text.isdecimal() else text


def axes(text: str) -> int | tuple[int, ...]:
    """Reads an axis, or several separated by commas.

    >>> axes("-2,-1")
    (-2, -1)
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, but a whole number is wanted, or several with commas") from error
    return found[0] if len(found) == 1 else found


def truth(text: str) -> bool:
    """Reads `true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, but true or false is wanted")
    return text.lower() == "true"


RULE_OPTIONS: dict[str, tuple[str, Any]] = {
    "bits": ("bits", int), "method": ("method", str), "granularity": ("granularity", granularity),
    "output_axis": ("axis", axes), "scale": ("scale", scale), "codebook_format": ("codebook_format", codebook_format),
    "keep_zero": ("keep_zero", truth), "tolerance": ("tolerance", tolerance), "min_size": ("min_size", int),
    "skip": ("skip", truth), "stack_axes": ("stack_axes", int),
}  # fmt: skip


def rule(text: str) -> nuqjax.Rule:
    """Reads `PATTERN:option=value,…`; the pattern may contain colons.

    >>> rule("(?:conv|dense)/kernel:bits=8,granularity=channels/4")
    Rule('(?:conv|dense)/kernel', bits=8, granularity=ChannelGroups(size=4))
    """
    pattern, colon, assignments = text.rpartition(":")
    options: dict[str, Any] = {}
    # An axis may be a list with commas, so a part without "=" belongs to the option before it.
    for part in re.split(r",(?=[a-z_]+=)", assignments) if colon else [text]:
        name, equals, value = part.partition("=")
        if not colon or not equals or name not in RULE_OPTIONS:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {part!r}, but PATTERN:option=value,… is wanted; options: {', '.join(RULE_OPTIONS)}"
            )
        key, read = RULE_OPTIONS[name]
        try:
            options[key] = read(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {name}={value!r}: {error}") from error
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {name}: {error}") from error
    try:
        return nuqjax.Rule(pattern, **options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
