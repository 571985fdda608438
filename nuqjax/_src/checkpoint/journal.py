"""Records the finished leaves of a conversion for resuming: tensors in one file, a line of JSON for each in another."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO

from nuqjax._src.report.leaf_report import LeafReport
from nuqjax._src.report.report import Report
from nuqjax._src.store.describe import checksum
from nuqjax._src.store.file import Stored, parse_json
from nuqjax._src.store.report import report_from_json, report_to_json
from nuqjax._src.store.target import forget, naming
from nuqjax._src.store.write import to_json

_CHUNK = 1 << 24  # bytes read at once
_LINES, _TENSORS = "journal", "tensors"
_VERSION = "journal 3"
_FIELDS = {"key", "entry", "tensors", "report"}


@contextmanager
def resumable(target: str | os.PathLike[str], kept: Sized) -> Iterator[None]:
    """Adds to an error inside, whatever it is, a note on how to go on, if some parts are kept; it is raised again."""
    try:
        yield
    except BaseException as error:
        if len(kept):
            done = f"{os.fspath(target)}.partial has what is done"
            error.add_note(f"{done}; --resume (resume=True) goes on from there")
        raise


class Journal:
    """The finished leaves, each by a key that covers all it depends on except the source, which `mark` identifies.

    A line holds JSON and its CRC-32, so that a line cut off by a kill or a full disk is detected. A leaf's tensors have
    checksums of their own for the same purpose. A leaf that is not complete is compressed again.
    """

    def __init__(self, folder: str, mark: str, resume: bool) -> None:
        """Opens the journal in a folder; without `resume`, an existing one is removed first.

        Raises:
          ValueError: the existing journal is of another source, or of another version of the library.
        """
        self._folder, self._data = folder, os.path.join(folder, _TENSORS)
        self._records: dict[str, dict[str, Any]] = {}
        name, length = os.path.join(folder, _LINES), 0
        head = to_json({"nuqjax": _VERSION, "mark": mark})
        if not resume:
            self.remove()
        with suppress(FileNotFoundError), open(name, "rb") as lines:
            length = self._take_over(lines, head)
        try:
            with naming(folder), ExitStack() as stack:
                self._lines: BinaryIO = stack.enter_context(open(name, "r+b" if length else "wb"))
                self._lines.truncate(length)
                self._lines.seek(length)
                self._lines.write(b"" if length else head.encode() + b"\n")
                self._lines.flush()
                self._tensors: BinaryIO = stack.enter_context(open(self._data, "ab"))
                self._files = stack.pop_all()
        except OSError:
            if not length:
                self.remove()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # bytes that cannot be flushed here belong to no finished leaf
            self._files.close()
        if not self._records:
            self.remove()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def remove(self) -> None:
        """Removes all records and the files that hold them, and what a run with data has left."""
        self._records = {}
        forget(self._folder)

    def _take_over(self, lines: BinaryIO, head: str) -> int:
        """Reads the complete records; returns the length of the journal up to its last complete line."""
        length = 0
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            if number == 0 and line != head.encode() + b"\n":
                other = "source" if line.startswith(head[: head.index(",")].encode()) else "version of nuqjax"
                raise ValueError(f"{self._folder} belongs to another {other}; without resume, the run starts over")
            if number > 0 and line[:9] == b"%08x " % zlib.crc32(line[9:-1]):
                record = parse_json(line[9:-1], self._folder)
                if isinstance(record, dict) and set(record) == _FIELDS and self._is_whole(record):
                    self._records[record["key"]] = record
            length += len(line)
        return length

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        """Returns whether the tensors of a record are on disk with the right checksums."""
        for tensor in record["tensors"].values():
            if checksum(self._chunks(tensor["begin"], tensor["nbytes"])) != tensor["reference"]["crc32"]:
                return False
        return True

    def _chunks(self, begin: int, nbytes: int) -> Iterator[bytes]:
        with suppress(FileNotFoundError), open(self._data, "rb") as file:
            file.seek(begin)
            while nbytes and (chunk := file.read(min(nbytes, _CHUNK))):
                nbytes -= len(chunk)
                yield chunk

    def add(
        self,
        key: str,
        entry: Mapping[str, Any],
        references: Mapping[str, Any],
        stored: Mapping[str, Stored],
        report: LeafReport,
    ) -> None:
        """Records a finished leaf, as `described` returns it: writes its tensors first, then its line."""
        with naming(self._folder):
            self._add(key, entry, references, stored, report)

    def _add(self, key: str, entry: Any, references: Any, stored: Mapping[str, Stored], report: LeafReport) -> None:
        tensors = {}
        for role, tensor in stored.items():
            begin = self._tensors.tell()
            for chunk in tensor.chunks():
                self._tensors.write(chunk)
            tensors[role] = {
                "begin": begin, "nbytes": tensor.nbytes, "code": tensor.code, "shape": tensor.shape,
                "reference": references[role],
            }  # fmt: skip
        self._tensors.flush()
        kept = report_to_json(Report((report,)))
        text = to_json({"key": key, "entry": entry, "tensors": tensors, "report": kept}).encode()
        self._lines.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._lines.flush()
        self._records[key] = parse_json(text, self._folder)

    def leaf(self, key: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Stored], LeafReport]:
        """Returns a finished leaf: entry, references, tensors (read only when they are written out) and report."""
        record = self._records[key]
        stored = {}
        for role, tensor in record["tensors"].items():
            chunks = _bound(self._chunks, tensor["begin"], tensor["nbytes"])
            stored[role] = Stored(role, tensor["code"], tuple(tensor["shape"]), chunks)
        references = {role: tensor["reference"] for role, tensor in record["tensors"].items()}
        (report,) = report_from_json(record["report"], self._folder).leaves
        return record["entry"], references, stored, report


def _bound(chunks: Callable[[int, int], Iterator[bytes]], begin: int, nbytes: int) -> Callable[[], Iterable[bytes]]:
    return lambda: chunks(begin, nbytes)
