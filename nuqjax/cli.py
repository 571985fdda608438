"""The command line: the public functions, applied to files.

Exit status: 0: done; 1: refused or failed, with one line that says why; 2: the command is not understood; 130:
interrupted.
"""

import os
import sys
from collections.abc import Sequence

from nuqjax._src.cli.commands import completion, compress, decompress, demo, inspect, plot
from nuqjax._src.cli.compare import compare
from nuqjax._src.cli.parser import parser
from nuqjax._src.cli.process import notes, one_line, open_streams, plain_warnings, stoppable
from nuqjax._src.leaf.paths import printable

_COMMANDS = {
    "compress": compress, "decompress": decompress, "inspect": inspect, "plot": plot, "compare": compare,
    "demo": demo, "completion": completion,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    closed = open_streams()
    args = vars(parser().parse_args(argv))
    command = _COMMANDS[args.pop("command")]
    try:
        with stoppable(), plain_warnings():
            command(**args)
        sys.stdout.flush()
        if closed is not None and closed.getvalue():
            raise OSError("standard output is closed: nothing can be shown")
    except KeyboardInterrupt as interrupt:
        print("; ".join(["nuqjax: interrupted", *notes(interrupt)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # as when it is piped into `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print("; ".join([f"nuqjax: error: {printable(one_line(error), 4000)}", *notes(error)]), file=sys.stderr)
        return 1
    return 0
