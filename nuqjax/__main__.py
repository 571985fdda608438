"""Runs the command line: `python -m nuqjax`."""

import sys

from nuqjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
