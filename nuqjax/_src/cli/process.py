"""The process of a command: its streams, signals and warnings, and errors in one line."""

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def open_streams() -> io.StringIO | None:
    """Replaces standard streams that are closed (`>&-`), so that no file is opened under their numbers.

    Returns a buffer that collects what a closed standard output would show; None if it is open.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    closed = io.StringIO() if sys.stdout is None else None
    sys.stdout, sys.stderr = sys.stdout or closed, sys.stderr or io.StringIO()
    return closed


@contextmanager
def stoppable() -> Iterator[None]:
    """Makes SIGTERM end a command as Ctrl-C does, and makes sure that neither is lost.

    Python drops an exception that a signal handler raises inside a callback of the garbage collector, and JAX has such
    a callback. A timer then sends a signal again, a moment later.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            hook(dropped)

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if hasattr(signal, "setitimer") else [])]
    before, hook = {number: signal.signal(number, stop) for number in numbers}, sys.unraisablehook
    if hasattr(signal, "setitimer"):  # not on Windows
        sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Prints each warning of the library as one line, without the place in the code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="nuqjax")
        warnings.showwarning = lambda message, *_: print(f"nuqjax: warning: {message}", file=sys.stderr)
        yield


def notes(error: BaseException) -> list[str]:
    """Returns the notes of an error, which say what the user can do about it."""
    return getattr(error, "__notes__", [])


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
