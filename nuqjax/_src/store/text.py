"""Writes and reads the layout's JSON in the metadata: plain, or deflated where that is shorter."""

import base64
import binascii
import zlib
from typing import Any

from nuqjax._src.store.file import MAX_HEADER, parse_json
from nuqjax._src.store.write import to_json

PLAIN, DEFLATED, POOLED, SHARED = 1, 2, 3, 4  # versions of the format; 2 is the deflated form of any of the others
# A deflated text of n characters expands to at most 32·n + 65,536 bytes of JSON, so a small file cannot fill the memory
# of its reader. A layout that would expand further is written plain.
_EXPANSION, _FREE = 32, 1 << 16


def to_text(layout: dict[str, Any], version: int = PLAIN) -> str:
    """Returns the text of a layout; equal layouts give equal texts.

    >>> to_text({"leaves": []})
    '{"version":1,"leaves":[]}'
    >>> text = to_text({"leaves": ["leaf"] * 1000})
    >>> text[:24], len(text) < 200
    ('{"version":2,"deflated":', True)
    >>> from_text(text, "FILE")["leaves"][-1]
    'leaf'
    """
    plain = to_json({"version": version, **layout})
    stored = base64.b64encode(zlib.compress(plain.encode(), 9)).decode()
    text = to_json({"version": DEFLATED, "deflated": stored})
    fits = len(plain.encode()) <= _most(len(stored))
    return text if fits and len(text) < len(plain) else plain


def _most(length: int) -> int:
    return min(_EXPANSION * length + _FREE, MAX_HEADER)


def from_text(text: str, name: str) -> dict[str, Any]:
    """Returns the layout in a text, with the version of its plain form.

    Raises:
      ValueError: the text is not a layout, or has a version that this library does not read.
    """
    layout = _parsed(text, name)
    if layout["version"] == DEFLATED:
        stored = layout.get("deflated")
        if set(layout) != {"version", "deflated"} or not isinstance(stored, str):
            raise ValueError(f"{name}: the layout does not have just version and deflated")
        layout = _parsed(_inflated(stored, name), name)
    if layout["version"] not in (PLAIN, POOLED, SHARED):
        newer = "; a newer nuqjax reads it" if layout["version"] > SHARED else ""
        raise ValueError(
            f"{name}: version {layout['version']} of the format, but this nuqjax reads versions 1 to 4{newer}"
        )
    return layout


def _parsed(text: str | bytes, name: str) -> dict[str, Any]:
    layout = parse_json(text, f"{name}: the layout")
    if not isinstance(layout, dict) or type(layout.get("version")) is not int:
        raise ValueError(f"{name}: the layout has no version")
    return layout


def _inflated(stored: str, name: str) -> bytes:
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(base64.b64decode(stored, validate=True), _most(len(stored)) + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError(f"{name}: the layout is not deflated as the format requires: {error}") from error
    if len(found) > _most(len(stored)):
        raise ValueError(f"{name}: a layout of {len(stored)} bytes that would expand more than {_EXPANSION}-fold")
    if not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise ValueError(f"{name}: the layout is not deflated as the format requires: it ends too early or too late")
    return found
