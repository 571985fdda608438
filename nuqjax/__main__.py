"""`python -m nuqjax`: the command line."""

import sys

from nuqjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
