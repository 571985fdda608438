"""Files written completely or not at all, one writer at a time, without touching files of others.

While a target is being written, a folder `TARGET.partial` next to it holds the lock and the unfinished files. Only two
kinds of files are replaced or removed: the target itself, and files that this library wrote. The latter are an index
with this library's mark, and shards named by such an index or by the list that a killed save left behind.
"""

import errno
import os
import re
import socket
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple

from nuqjax._src.store.file import MAX_HEADER, index_path, open_mapped, parse_json

try:
    import fcntl
except ImportError:  # Windows has no such locks: a second writer is not detected there
    fcntl = None

_LOCK, _PLACED, _PART = "lock", "shards", ".part"
RESULT = ".result"  # ends the name of a file with a finished part of the work, for resuming
_MARKS = {  # files that the folder of a target may hold, and the bytes with which each begins
    _LOCK: (b"nuqjax: ",),
    _PLACED: (b"nuqjax: ",),
    "journal": (b'{"nuqjax":"journal ', b'{"mark":"'),
}
_OTHERS = {"tensors"}
_HEAD = "nuqjax: shards that are to go unless the index names them"


class Target(NamedTuple):
    """A file being written, links resolved; its folder; the permissions of the file it replaces (None: no file)."""

    path: str
    folder: str
    mode: int | None


@contextmanager
def claim(path: str | os.PathLike[str], inputs: Iterable[str] = (), sharded: bool = False) -> Iterator[Target]:
    """Locks a target for writing until the block ends; first removes what a killed writer left.

    Args:
      path: the file to write.
      inputs: files that are read in the meantime; none of them may be replaced or removed.
      sharded: whether the target will be split over several files.

    Raises:
      BlockingIOError: another process is writing the target; the message says which.
      FileExistsError: a file that this library did not write would be replaced or removed.
      OSError: the path is not a regular file, or cannot be written.
      ValueError: one of the inputs would be replaced or removed.
    """
    path = os.path.realpath(os.fspath(path))
    if path.endswith(".index.json"):
        raise ValueError(f"{path} is the name of an index: give the name without .index.json")
    read = {(status.st_dev, status.st_ino) for status in map(os.stat, inputs)}
    _check_replaced(path, read)
    folder = f"{path}.partial"
    lock = _locked(folder, path)
    try:
        try:
            if sharded:
                check_sharded(path)
            files = [path, *([index_path(path), *own_shards(path)] if sharded or own_index(path) else [])]
            for name in files:
                _check_replaced(name, read)
            modes = [stat.S_IMODE(os.stat(name).st_mode) for name in files if os.path.exists(name)]
            target = Target(path, folder, modes[0] if modes else None)
            clear(target)
            yield target
        finally:
            clear(Target(path, folder, None))
            if set(os.listdir(folder)) <= {_LOCK}:
                os.unlink(os.path.join(folder, _LOCK))
                os.rmdir(folder)
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def replacing(path: str | os.PathLike[str], inputs: Iterable[str] = ()) -> Iterator[BinaryIO]:
    """Opens a file to write that replaces the one at `path`, complete and flushed to disk, when the block ends.

    An error in the block leaves the old file unchanged and no other files. Arguments and errors are those of `claim`.
    """
    with claim(path, inputs) as target, placing(target, target.path) as file:
        yield file


@contextmanager
def placing(target: Target, path: str) -> Iterator[BinaryIO]:
    """Opens a file of a claimed target: the target itself, its index, or one of its shards."""
    part = os.path.join(target.folder, os.path.basename(path) + _PART)
    mode = 0o666 if target.mode is None else target.mode & 0o700  # never wider than the final permissions
    with naming(path), open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    if target.mode is not None:
        os.chmod(part, target.mode)
    os.replace(part, path)
    _sync_folder(os.path.dirname(path))


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Adds this file's name to an error about missing disk space, which names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = error.filename or path
        raise


def _sync_folder(folder: str) -> None:
    """Flushes the names in a folder to disk, on systems that support it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# The folder of a target


def _locked(folder: str, path: str) -> int | None:
    """Locks the lock file in a target's folder, makes both if missing; returns None on systems without such locks."""
    name = os.path.join(folder, _LOCK)
    for _ in range(100):
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        lock = None
        try:
            check_folder(folder)
            lock = os.open(name, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            _lock(lock, path)
            held = os.path.samestat(os.fstat(lock), os.stat(name))
            if held:
                with suppress(OSError):  # no disk space for the name of the holder: the lock works without it
                    os.ftruncate(lock, 0)
                    os.write(lock, f"nuqjax: process {os.getpid()} on {socket.gethostname()}\n".encode())
        except FileNotFoundError:  # the previous holder has just removed it
            held = False
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise
        if held and fcntl is not None:
            return lock
        if lock is not None:
            os.close(lock)
        if held:
            return None
    raise BlockingIOError(f"{path}: {folder} appears and disappears: another process is writing it")


def _lock(lock: int, path: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        found = re.match(r"nuqjax: (process \d+ on [\w.-]+)", os.pread(lock, 300, 0).decode(errors="replace"))
        who = found[1] if found else "another process"
        raise BlockingIOError(
            f"{path}: {who} is writing it; wait until it has finished, or name another target"
        ) from error
    except OSError:  # a file system without locks
        pass


def check_folder(folder: str) -> None:
    """Raises FileExistsError unless this library wrote everything in the folder of a target."""
    if stat.S_ISDIR(os.lstat(folder).st_mode):
        names = set(os.listdir(folder))
        marked = [_begins(os.path.join(folder, name), _MARKS[name]) for name in names & set(_MARKS)]
        others = [name for name in names - set(_MARKS) - _OTHERS if not name.endswith((_PART, RESULT))]
        if not names or (marked and all(marked) and not others):
            return
    raise FileExistsError(f"{folder} was not left by nuqjax: move it away, or name another target")


def _begins(path: str, marks: Sequence[bytes]) -> bool:
    """Returns whether a file begins with one of the marks, or was cut off inside one."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        start = file.read(100)
    return any(start.startswith(mark) or mark.startswith(start) for mark in marks)


def list_placed(target: Target, names: Iterable[str]) -> None:
    """Writes the list of shards: at the end, or after a kill, those that the index does not name are removed."""
    names = list(map(os.path.basename, names))
    if names:
        with open(os.path.join(target.folder, _PLACED), "wb") as file:
            file.write("\n".join([_HEAD, *names, ""]).encode())


def clear(target: Target) -> None:
    """Removes unfinished files, and listed shards that the index does not name."""
    for name in os.listdir(target.folder):
        if name.endswith(_PART):
            os.unlink(os.path.join(target.folder, name))
    placed = os.path.join(target.folder, _PLACED)
    if not os.path.exists(placed):
        return
    with open(placed, encoding="utf-8", errors="replace") as file:
        head, *names = file.read().split("\n")
    if head == _HEAD and names and names[-1] == "":  # complete; no shard is written before the list is complete
        named = {os.path.basename(name) for name in own_shards(target.path)}
        folder = os.path.dirname(target.path)
        _remove(os.path.join(folder, name) for name in names if _is_shard(name, target.path) and name not in named)
    os.unlink(placed)


def forget(folder: str) -> None:
    """Removes the finished parts of the work that a folder keeps for resuming."""
    kept = [name for name in os.listdir(folder) if name in ("journal", *_OTHERS) or name.endswith(RESULT)]
    _remove(os.path.join(folder, name) for name in kept)


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)


# What may be replaced


def _check_replaced(path: str, inputs: Collection[tuple[int, int]] = ()) -> None:
    """Raises unless `path` is free, or holds a regular file that is not one of the inputs (device, inode)."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a directory; a file is wanted")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file, and only regular files are replaced")
    if (status.st_dev, status.st_ino) in inputs:
        raise ValueError(f"{path} would be replaced or removed, but it is read from: name another target")


def check_sharded(path: str) -> None:
    """Raises if shards at `path` would hide or replace a file that this library did not write."""
    index = index_path(path)
    _check_replaced(index)
    if os.path.exists(index) and own_index(path) is None:
        raise FileExistsError(f"{index} was not written by nuqjax: move it away, or name another target")
    if os.path.exists(path) and not _is_saved(path):
        raise FileExistsError(
            f"{path} was not written by nuqjax.save, and shards under its name would be hidden by it: move it away, "
            "or name another target"
        )


def _is_saved(path: str) -> bool:
    try:
        return "nuqjax" in open_mapped(path).metadata
    except (OSError, ValueError):
        return False


def own_index(path: str) -> dict[str, Any] | None:
    """Returns the index of the shards saved under this name if this library wrote it, else None."""
    index = index_path(path)
    try:
        if not stat.S_ISREG(os.lstat(index).st_mode) or os.path.getsize(index) > MAX_HEADER:
            return None
        with open(index, "rb") as file:
            found = parse_json(file.read(), index)
    except (OSError, ValueError):
        return None
    metadata = found.get("metadata") if isinstance(found, dict) else None
    own = isinstance(metadata, dict) and ("nuqjax" in metadata or metadata.get("writer") == "nuqjax")
    return found if own and isinstance(found.get("weight_map"), dict) else None


def own_shards(path: str) -> list[str]:
    """Returns the paths of the shards that this library's index for this name lists."""
    shards = set((own_index(path) or {"weight_map": {}})["weight_map"].values())
    folder = os.path.dirname(path)
    return sorted(os.path.join(folder, name) for name in shards if isinstance(name, str) and _is_shard(name, path))


def stem(path: str) -> str:
    return path.removesuffix(".safetensors")


def _is_shard(name: str, path: str) -> bool:
    return bool(
        re.fullmatch(re.escape(stem(os.path.basename(path))) + r"-[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors", name)
    )
