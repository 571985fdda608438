"""Keeps finished parts of a computation on disk, so that a run that was stopped need not repeat them."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nuqjax._src.store.store import load, save_at
from nuqjax._src.store.target import RESULT, Target, forget

_VERSION = "results 1"  # to be raised where the same call comes to give other results


class Results:
    """Trees by a key that covers all that they depend on: each is a file in the folder of a target."""

    def __init__(self, place: Target, resume: bool) -> None:
        """Takes over what the folder of a claimed target holds; without `resume` it is removed."""
        self._folder = place.folder
        if not resume:
            forget(self._folder)

    def __len__(self) -> int:
        return sum(name.endswith(RESULT) for name in os.listdir(self._folder))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the tree that is kept for a key; if there is none, or it is damaged, makes it and keeps it.

        Args:
          key: a value whose `repr` tells it from all others.
          make: makes the tree: of dicts, arrays, compressed leaves, numbers and strings.
        """
        name = hashlib.sha256(repr((_VERSION, key)).encode(errors="surrogatepass")).hexdigest()
        path = os.path.join(self._folder, name + RESULT)
        with suppress(OSError, ValueError):
            return load(path)
        made = make()
        save_at(Target(path, self._folder, None), made)
        return made

    def remove(self) -> None:
        """Removes all that is kept."""
        forget(self._folder)
