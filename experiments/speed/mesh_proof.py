"""What the proof of a row costs on a mesh of devices that this host pretends to have, beside one device.

    python -m experiments.speed.mesh_proof

A row of Student-t₃ values is fitted whole and distributed, without a proof and with one. The devices share this host's
processors, so that a mesh can only be slower: what is seen is what the questions of the proof add.
"""

import argparse
import os
import statistics
import time


def median_time(fit, *arguments, repeats: int, **options) -> float:
    """Seconds, after one call that compiles."""
    import jax

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(fit(*arguments, **options))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Times one row for each number of levels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--size", type=int, default=10**6, help="values of the row")
    parser.add_argument("--levels", default="16,64")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    # Before JAX looks for devices.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={given.devices}"
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import nuqjax

    row = jnp.asarray(np.random.default_rng(0).standard_t(3, (1, given.size)), jnp.float32)
    mesh = jax.make_mesh((given.devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(row, NamedSharding(mesh, PartitionSpec(None, "d")))
    for levels in map(int, given.levels.split(",")):
        for name, rows in (("one device", row), (f"{given.devices} devices", placed)):
            without, proven = (
                median_time(nuqjax.fit, rows, levels, tolerance=tolerance, repeats=given.repeats)
                for tolerance in (None, 1e-6)
            )
            fitted = nuqjax.fit(rows, levels)
            gap = 1 - float(fitted.lower_bound[0]) / float(fitted.sse[0])
            print(f"{levels:4} levels, {name}: {without:.3f} s without, {proven:.3f} s with the proof, gap {gap:.1e}")


if __name__ == "__main__":
    main()
