"""Other implementations of one-dimensional k-means, called alike: rows `[R, N]` of numpy values and K to levels.

They are imported by name as they are first called: none of them need be installed.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np


class Tool(NamedTuple):
    """Another implementation of one-dimensional k-means.

    Attributes:
      name: what the table calls it.
      package: what must be importable.
      fit: rows `[R, N]` and K to R arrays of at most K levels.
      slow: not called where its predicted time exceeds the budget.
      longest: the longest row that it is given.
      most_levels: the largest K that it accepts.
      needs: what else must be importable.
    """

    name: str
    package: str
    fit: Callable[[np.ndarray, int], Sequence[np.ndarray]]
    slow: bool = True
    longest: int | None = None
    most_levels: int = 256
    needs: tuple[str, ...] = ()


def _by_row(fit_row: Callable[[np.ndarray, int], Any]) -> Callable[[np.ndarray, int], Sequence[np.ndarray]]:
    return lambda rows, num_levels: [np.asarray(fit_row(row, num_levels)) for row in rows]


def _by_count(fit_counted: Callable[[np.ndarray, np.ndarray, int], Any]):
    """On the distinct values of a row of 16-bit floats and their counts; numpy sorts bit patterns fastest."""

    def fit_row(row: np.ndarray, num_levels: int):
        patterns, counts = np.unique(row.view(np.uint16), return_counts=True)
        return fit_counted(patterns.view(row.dtype).astype(np.float32), counts, num_levels)

    return _by_row(fit_row)


def _flash1dkmeans(row, num_levels):
    return import_module("flash1dkmeans").kmeans_1d(row, num_levels, random_state=0)[0]


def _flash1dkmeans_sorted(row, num_levels):
    """Without the argsort that only the labels need; its other way to leave labels out logs a warning every time."""
    return import_module("flash1dkmeans").kmeans_1d(np.sort(row), num_levels, is_sorted=True, random_state=0)[0]


def _flash1dkmeans_counted(values, counts, num_levels):
    return import_module("flash1dkmeans").kmeans_1d(values, num_levels, sample_weights=counts, random_state=0)[0]


def _kmeans1d(row, num_levels):
    return import_module("kmeans1d").cluster(row.tolist(), num_levels).centroids


def _ckmeans(row, num_levels):
    clusters = import_module("ckmeans").ckmeans(row.astype(np.float64), num_levels)
    return [cluster.mean() for cluster in clusters]


def _sklearn(row, num_levels):
    return _sklearn_counted(row, None, num_levels)


def _sklearn_counted(values, counts, num_levels):
    fitted = (
        import_module("sklearn.cluster")
        .KMeans(num_levels, n_init=1, random_state=0)
        .fit(values[:, None], sample_weight=counts)
    )
    return fitted.cluster_centers_[:, 0]


def _coremltools_counted(values, counts, num_levels):
    """What its palettizers call for the distinct values of a float16 weight."""
    return import_module("coremltools._deps.kmeans1d").cluster(values, num_levels, weights=counts).centroids


def _coremltools_channels(rows, num_levels):
    """Its palettizer of arrays, one look-up table for each row."""
    passes = import_module("coremltools.optimize.coreml._quantization_passes")
    return passes.palettize_weights.blockwise_compress(rows, "KMEANS", _bits(num_levels), [1, 0]).lut.reshape(
        len(rows), -1
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars and messages."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _torch_model(rows: np.ndarray) -> Any:
    """A PyTorch model whose one weight is the rows, as float32."""
    torch = import_module("torch")
    layer = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(torch.from_numpy(np.array(rows, np.float32)))
    return torch.nn.Sequential(layer)


def _bits(num_levels: int) -> int:
    return num_levels.bit_length() - 1


def _coremltools_torch(rows, num_levels):
    """Its palettizer of PyTorch models, as it is by default: weights are first rounded to four decimals."""
    with _quietly():
        palettization = import_module("coremltools.optimize.torch.palettization")
        sharing = {"granularity": "per_grouped_channel", "group_size": 1} if len(rows) > 1 else {}
        config = {"global_config": {"n_bits": _bits(num_levels), **sharing}}
        config = palettization.PostTrainingPalettizerConfig.from_dict(config)
        model = palettization.PostTrainingPalettizer(_torch_model(rows), config).compress()
    return model.state_dict()["0._COREML_/weight/lut"].numpy().reshape(len(rows), num_levels)


def _coreai(rows, num_levels):
    """Apple's later palettizer of PyTorch models, as it is by default: it rounds like the other."""
    with _quietly():
        torch, palettization = import_module("torch"), import_module("coreai_opt.palettization")
        specs = import_module("coreai_opt.palettization.spec")
        sharing = (
            specs.PerGroupedChannelGranularity(axis=0, group_size=1) if len(rows) > 1 else specs.PerTensorGranularity()
        )
        spec = palettization.PalettizationSpec(n_bits=_bits(num_levels), granularity=sharing)
        config = palettization.KMeansPalettizerConfig(
            global_config=palettization.ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
        )
        palettizer = palettization.KMeansPalettizer(_torch_model(rows), config)
        model = palettizer.prepare((torch.zeros(1, rows.shape[1]),))
    return model.state_dict()["0.parametrizations.weight.0.centroids"].numpy().reshape(len(rows), -1)


_FLASH = Tool("flash1dkmeans", "flash1dkmeans", _by_row(_flash1dkmeans), slow=False)
_FLASH_SORTED = Tool("flash1dkmeans of sorted", "flash1dkmeans", _by_row(_flash1dkmeans_sorted), slow=False)
_KMEANS1D = Tool("kmeans1d", "kmeans1d", _by_row(_kmeans1d), longest=10**6)
_CKMEANS = Tool("ckmeans", "ckmeans", _by_row(_ckmeans), longest=10**6, most_levels=255)
_SKLEARN = Tool("scikit-learn", "sklearn", _by_row(_sklearn))
COREMLTOOLS = Tool("coremltools PostTrainingPalettizer", "coremltools", _coremltools_torch, needs=("torch",))
_COREAI = Tool("coreai-opt KMeansPalettizer", "coreai_opt", _coreai, needs=("torch",))

ROW_TOOLS = (_FLASH, _FLASH_SORTED, _KMEANS1D, _CKMEANS, _SKLEARN, COREMLTOOLS, _COREAI)
HALF_TOOLS = (
    Tool("unique + coremltools' kmeans1d", "coremltools", _by_count(_coremltools_counted), slow=False),
    Tool("unique + flash1dkmeans", "flash1dkmeans", _by_count(_flash1dkmeans_counted), slow=False),
    Tool("unique + scikit-learn", "sklearn", _by_count(_sklearn_counted), slow=False),
    COREMLTOOLS,
    _COREAI,
)
GROUP_TOOLS = (
    Tool("coremltools palettize_weights", "coremltools", _coremltools_channels), _FLASH_SORTED, _KMEANS1D, _CKMEANS,
    _SKLEARN,
)  # fmt: skip
CHANNEL_TOOLS = (COREMLTOOLS, _COREAI, *GROUP_TOOLS)
DISTRIBUTIONS = {"sklearn": "scikit-learn", "coreai_opt": "coreai-opt"}  # packages that are imported as otherwise named
