"""Where the time of a fit goes: the functions of nuqjax by the time spent in them and in what they call.

    python -m experiments.speed.profile_fit --length 4608 --levels 16

Student-t rows (16, fewer of long ones) are fitted at once, a few times, under Python's profiler, so on one thread.
"""

import argparse
import cProfile
import inspect
import pstats
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments.speed.draws import student_t

_PACKAGE = Path(inspect.getfile(nuqjax)).parent
_ROWS = 16
_VALUES = 2**18
_REPEATS = 20


def profile(
    length: int, num_levels: int, tolerance: float | None, dtype: str = "float32"
) -> list[tuple[str, int, float]]:
    """Function, calls and milliseconds of a row, for every function of nuqjax; the longest first."""
    count = max(1, min(_ROWS, _VALUES // length))
    rows = jax.device_put(student_t(5, (count, length), jnp.dtype(dtype)))

    def fit():
        jax.block_until_ready(nuqjax.fit(rows, num_levels, tolerance=tolerance))

    fit()  # compiles
    profiler = cProfile.Profile()
    for _ in range(_REPEATS):
        profiler.runcall(fit)
    statistics: dict = pstats.Stats(profiler).stats  # pyright: ignore[reportAttributeAccessIssue]
    found = [
        (
            ".".join((*Path(file).relative_to(_PACKAGE).with_suffix("").parts, name)),
            calls // _REPEATS,
            cumulative / _REPEATS / count * 1e3,
        )
        for (file, _, name), (_, calls, _, cumulative, _) in statistics.items()
        if Path(file).is_relative_to(_PACKAGE)
    ]
    return sorted(found, key=lambda entry: -entry[2])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4608, help="values of a row (default 4608)")
    parser.add_argument("--levels", type=int, default=16, help="K (default 16)")
    parser.add_argument("--tolerance", type=float, help="prove to within it; by default nothing is proven")
    parser.add_argument("--dtype", default="float32", help="of the values (default float32)")
    options = parser.parse_args()
    found = profile(options.length, options.levels, options.tolerance, options.dtype)
    total = found[0][2]
    table = Table("function, what it calls included", "calls", "ms a row", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, calls, milliseconds in found:
        if milliseconds >= 0.01 * total:
            table.add_row(name, str(calls), f"{milliseconds:.3f}", f"{milliseconds / total:.0%}")
    console = Console()
    console.print(table)
    console.print(f"{options.length / total / 1e3:.2f} million values a second on one thread")


if __name__ == "__main__":
    main()
