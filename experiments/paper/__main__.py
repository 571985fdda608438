"""The paper's question: `python -m experiments.paper`, or with data: `python -m experiments.paper --calibrated`."""

import sys
from collections.abc import Sequence

from experiments.paper import calibrated, study


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `experiments.paper.study`, or of `experiments.paper.calibrated`; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--calibrated" in words:
        return calibrated.main([word for word in words if word != "--calibrated"])
    return study.main(words)


if __name__ == "__main__":
    sys.exit(main())
