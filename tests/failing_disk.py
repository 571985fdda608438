"""A disk at whose n-th change the process is killed: half of what it writes is there, and nothing happens after it."""

import builtins
import io
import os
from contextlib import contextmanager
from unittest import mock

from nuqjax._src.checkpoint import journal as convert_journal
from nuqjax._src.store import target as store_target

_CHANGES = ("mkdir", "rmdir", "unlink", "replace", "chmod", "ftruncate", "write", "fsync")


class Killed(BaseException):
    """Nothing in the library may hold it up."""


class Disk:
    """How many changes there were, and at which it ends; None: never."""

    def __init__(self, last):
        self.changes, self.last = 0, last

    def step(self):
        """One change; at the last, and ever after, Killed."""
        self.changes += 1
        if self.last is not None and self.changes >= self.last:
            raise Killed

    def file(self, path, mode="r", *_, opener=None, **text):
        """In place of `open`."""
        if "r" in mode and "+" not in mode:
            return builtins.open(path, mode, **text)
        self.step()
        return _File(self, path, mode, opener)


class _File(io.FileIO):
    """What is written is on the disk at once."""

    def __init__(self, disk, path, mode, opener):
        self._disk = disk
        super().__init__(path, mode.replace("b", ""), opener=opener)

    def write(self, data):
        try:
            self._disk.step()
        except Killed:
            if self._disk.changes == self._disk.last:
                super().write(bytes(data)[: len(bytes(data)) // 2])
            raise
        return super().write(data)

    def truncate(self, size=None):
        self._disk.step()
        return super().truncate(size)


@contextmanager
def failing_disk(last=None):
    """The library's writing on such a disk."""
    disk = Disk(last)

    def stepping(change):
        def changed(*args, **more):
            disk.step()
            return change(*args, **more)

        return changed

    def opened(path, flags, *mode, **more):
        if flags & os.O_CREAT:
            disk.step()
        return open_(path, flags, *mode, **more)

    open_ = os.open
    patches = [mock.patch.object(os, name, stepping(getattr(os, name))) for name in _CHANGES]
    patches += [mock.patch.object(os, "open", opened)]
    patches += [mock.patch.object(module, "open", disk.file, create=True) for module in (store_target, convert_journal)]
    for patch in patches:
        patch.start()
    try:
        yield disk
    finally:
        for patch in patches:
            patch.stop()
