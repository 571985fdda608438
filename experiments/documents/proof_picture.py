"""Draws `docs/knq.png`: prices of values, and a bound that closes round by round.

`python -m experiments.documents.proof_picture`
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import nuqjax

LEVELS = 6
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


def quantiles_of_student_t3(count: int) -> np.ndarray:
    """`[count]` ascending values that stand for the distribution without chance: its quantiles at even shares."""
    share = (np.arange(count) + 0.5) / count
    sample = np.sort(np.random.default_rng(0).standard_t(3, 200 * count))
    return sample[(share * len(sample)).astype(int)].astype(np.float32)


def draw(path: Path) -> None:
    """Left: the price of every value is where the parabolas of neighbouring levels meet. Right: the bound."""
    values = quantiles_of_student_t3(4000)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    tolerances = 10.0 ** -np.arange(1, 7)
    fits = [nuqjax.fit(jnp.asarray(values[None]), LEVELS, tolerance=tolerance) for tolerance in tolerances]
    gaps = [1 - float(fitted.lower_bound[0]) / float(fitted.sse[0]) for fitted in fits]
    levels = np.asarray(fits[-1].levels[0])

    x = np.linspace(-5, 5, 1000)
    for number, level in enumerate(levels):
        left.plot(
            x, (x - level) ** 2, color=GREY, linewidth=0.8, label=None if number else "(x − level)² of each level"
        )
    nearest = ((x[:, None] - levels) ** 2).min(axis=1)
    left.fill_between(x, nearest, color=BLUE, alpha=0.2, linewidth=0)
    left.plot(x, nearest, color=BLUE, label="squared error of a value at x")
    middles = (levels[1:] + levels[:-1]) / 2
    left.plot(middles, ((levels[1:] - levels[:-1]) / 2) ** 2, "o", color=ORANGE, label="between levels: price = error")
    left.plot(values[::40], np.full(100, -0.08), "|", color="black", markersize=6)
    left.set(xlim=(-5, 5), ylim=(-0.15, 2.2), xlabel="value", title=f"The middle ones of {LEVELS} levels")
    left.legend(loc="upper center", fontsize=9)
    right.loglog(tolerances, gaps, "o-", color=ORANGE, label="proven gap")
    right.loglog(tolerances, tolerances, "--", color=GREY, label="asked for")
    right.set(xlabel="tolerance", ylabel="(error − lower bound) / error", title="What is asked for is proven")
    right.invert_xaxis()
    right.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path("docs/knq.png"))
