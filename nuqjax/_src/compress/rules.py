"""Finds which options apply to which leaf by patterns of paths; the first match wins."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nuqjax._src.leaf.paths import nearest
from nuqjax._src.leaf.qformat import CodebookFormat
from nuqjax._src.leaf.rows import Granularity, Scale


class _Inherit:
    """Marks an option that a rule does not set: the one given to `compress` applies."""

    def __repr__(self) -> str:
        return "inherit"


INHERIT: Any = _Inherit()


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one leaf, as `nuqjax.compress` documents them, and what a rule sets for it."""

    bits: int = 4
    method: str = "knq"
    granularity: Granularity = "tensor"
    axis: int | Sequence[int] = -1
    scale: Scale = None
    codebook_format: CodebookFormat = None
    keep_zero: bool = False
    tolerance: float | None = 1e-6
    min_size: int = 256
    stack_axes: int = 0
    skip: bool | None = None
    rule: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Options for the leaves whose path matches: the first rule that matches a leaf applies to it.

    Attributes:
      pattern: a regular expression, searched for (`re.search`) in the leaf's path, whose keys are joined by "/".
      skip: True leaves the leaf dense; False compresses it even where `compress` would not by default (few values or
        axes, or no gain in size); None, the default, leaves that choice to `compress`.
      stack_axes: how many leading axes are stacked slices (scanned layers, experts), each with its own codebooks.
      bits, method, granularity, axis, scale, codebook_format, keep_zero, tolerance, min_size: as in
        `nuqjax.compress`; an option that is not given here is the one given there.

    Raises:
      ValueError: the pattern is not a regular expression, or `stack_axes` is negative.

    >>> Rule("Dense_0/kernel", bits=8)
    Rule('Dense_0/kernel', bits=8)
    """

    pattern: str = field(kw_only=False)
    skip: bool | None = None
    stack_axes: int = 0
    bits: int = INHERIT
    method: str = INHERIT
    granularity: Granularity = INHERIT
    axis: int | Sequence[int] = INHERIT
    scale: Scale = INHERIT
    codebook_format: CodebookFormat = INHERIT
    keep_zero: bool = INHERIT
    tolerance: float | None = INHERIT
    min_size: int = INHERIT

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rule {self.pattern!r}: not a regular expression: {error}") from error
        if isinstance(self.stack_axes, bool) or not isinstance(self.stack_axes, int) or self.stack_axes < 0:
            raise ValueError(f"rule {self.pattern!r}: stack_axes={self.stack_axes!r}, but 0 or more is wanted")

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.given().items())
        return f"Rule({', '.join([repr(self.pattern), *given])})"

    def given(self) -> dict[str, Any]:
        """Returns the options that this rule sets."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pattern"}
        default = {"skip": None, "stack_axes": 0}
        return {name: value for name, value in values.items() if value is not default.get(name, INHERIT)}


def resolve(paths: Sequence[str], options: Options, rules: Rule | Iterable[Rule]) -> list[Options]:
    """Returns the options of each leaf.

    Args:
      paths: the leaves' paths.
      options: the options that apply where no rule says otherwise.
      rules: the rules in order of precedence.

    Raises:
      ValueError: a rule matches no leaf, or only leaves that an earlier rule takes.
    """
    rules = [rules] if isinstance(rules, Rule) else rules
    wanted = 'a list of nuqjax.Rule is wanted, such as [nuqjax.Rule("kernel", bits=8)]'
    if isinstance(rules, str | Mapping) or not isinstance(rules, Iterable):
        raise ValueError(f"rules={rules!r}, but {wanted}")
    rules = list(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(f"rules hold {rule!r}, but {wanted}")
    matches = [[i for i, rule in enumerate(rules) if re.search(rule.pattern, path)] for path in paths]
    taken = {match[0] for match in matches if match}
    for i, rule in enumerate(rules):
        if i not in taken:
            overruled = [(path, rules[match[0]]) for path, match in zip(paths, matches, strict=True) if i in match]
            _raise_unused(rule, paths, overruled)
    first = [rules[match[0]] if match else None for match in matches]
    return [replace(options, rule=rule.pattern, **rule.given()) if rule else options for rule in first]


def _raise_unused(rule: Rule, paths: Sequence[str], overruled: Sequence[tuple[str, Rule]]) -> None:
    if overruled:
        path, earlier = overruled[0]
        raise ValueError(
            f"rule {rule.pattern!r} never applies: {path!r} and whatever else it matches "
            f"is taken by the earlier rule {earlier.pattern!r}"
        )
    near = nearest(rule.pattern, paths)
    raise ValueError(
        f"rule {rule.pattern!r} matches none of the {len(paths)} leaves; the nearest paths are "
        f"{', '.join(map(repr, near)) or '(the tree has none)'}"
    )
