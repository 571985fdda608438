"""Measurements that need a process of their own: seconds from its start, and its peak memory.

`measure(task, **arguments)` starts `python -m experiments.speed.fresh_process TASK ARGUMENTS STARTED` and reads what
that prints. Nothing is imported here but what the task needs: the imports count.
"""

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nuqjax
from experiments.speed.draws import aligned, student_t

TOLERANCE = 1e-6  # of the proof
_ROOT = Path(__file__).resolve().parents[2]


def measure(task: str, **arguments: Any) -> dict[str, Any]:
    """What a task returns when it runs in a new process, in which nothing is compiled yet.

    Raises:
      subprocess.CalledProcessError: it failed; what it wrote to standard error has been shown.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "experiments.speed.fresh_process", task, json.dumps(arguments), repr(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, cwd=_ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    # Linux's ru_maxrss of a process begins at that of the one that started it; VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        words = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()
        return int(words[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _loaded(path: Path) -> jax.Array:
    """The array of an `.npy` file, held once: JAX takes an aligned NumPy array as it is."""
    with path.open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        values = aligned(math.prod(shape), dtype)
        file.readinto(values.data)
    return jax.device_put(values.reshape(shape))


def _tree(started: float, folder: str, bits: int, repeats: int) -> dict[str, Any]:
    """Compresses the arrays of a folder of `.npy` files, per tensor, once from cold and then warm."""
    imported = time.time() - started
    params = {path.stem: _loaded(path) for path in sorted(Path(folder).glob("*.npy"))}
    loaded, before = time.time() - started, peak_bytes()
    cparams = jax.block_until_ready(nuqjax.compress(params, bits=bits))
    cold, peak = time.time() - started, peak_bytes()
    total = nuqjax.report(params, cparams).to_dict()["total"]
    del cparams
    runs = [_timed(lambda: nuqjax.compress(params, bits=bits)) for _ in range(repeats)]
    return {
        "values": total["weights"],
        "bytes": total["nbytes_before"],
        "compressed_bytes": total["nbytes_after"],
        "sqnr_db": total["sqnr_db"],
        "imported": imported,
        "loaded": loaded,
        "cold": cold,
        "runs": runs,
        "seconds": statistics.median(runs),
        "peak_before_bytes": before,
        "peak_bytes": peak,
    }


def _row(started: float, size: int, dtype: str, num_levels: int, repeats: int) -> dict[str, Any]:
    """Fits one row of Student-t values with 3 degrees of freedom, without and then with the proof."""
    del started
    rows = jax.device_put(student_t(3, (1, size), jnp.dtype(dtype)))  # without a copy
    result = {"values": size, "dtype": dtype, "bytes": rows.nbytes, "peak_before_bytes": peak_bytes()}
    for prefix, tolerance in (("", None), ("proven_", TOLERANCE)):
        first, *runs = (
            _timed(lambda t=tolerance: nuqjax.fit(rows, num_levels, tolerance=t)) for _ in range(repeats + 1)
        )
        result |= {
            f"{prefix}first_call": first,
            f"{prefix}runs": runs,
            f"{prefix}seconds": statistics.median(runs),
            f"{prefix}peak_bytes": peak_bytes(),
        }
    return result


_TASKS: dict[str, Callable[..., dict[str, Any]]] = {"tree": _tree, "row": _row}


if __name__ == "__main__":
    print(json.dumps(_TASKS[sys.argv[1]](float(sys.argv[3]), **json.loads(sys.argv[2]))))
