"""What a type checker sees of `compress`: `make types` checks this file, and nothing runs it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import nuqjax

PARAMS: dict[str, Any] = {}


def check(flag: bool) -> None:
    """Each call has the type that its flag gives it."""
    assert_type(nuqjax.compress(PARAMS, 4), Any)
    assert_type(nuqjax.compress(PARAMS, return_report=False), Any)
    assert_type(nuqjax.compress(PARAMS, scale="channel", return_report=True), tuple[Any, nuqjax.Report])
    assert_type(nuqjax.compress(PARAMS, return_report=flag), Any | tuple[Any, nuqjax.Report])
    nuqjax.compress(PARAMS, scael="channel")  # pyright: ignore[reportCallIssue]
