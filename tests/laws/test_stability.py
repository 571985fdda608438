"""What was compressed once comes out the same for ever: levels, indices and scales by their hashes, and an old file.

`python -m tests.laws.test_stability` writes `stability.json` and `stability.safetensors` anew; only a change that is
meant to give other results may do so, and says it in the changelog.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups, QFormat

HASHES = Path(__file__).with_name("stability.json")
FILE = Path(__file__).with_name("stability.safetensors")
VERSION_3 = Path(__file__).with_name("version3.safetensors")  # coded, small tensors shared; nothing writes it any more
METHODS = ("knq", "enq", "uniform_pow2", "dfp", "normal", "quantile", "pow2")  # `uniform` takes roots, by processor
CASES = {
    **{f"{method} {bits}": {"method": method, "bits": bits} for method in METHODS for bits in range(1, 9)},
    **{
        f"knq {name} {bits}": {"bits": bits, **options}
        for bits in (3, 4)
        for name, options in {
            "channel": {"granularity": "channel"},
            "channel groups": {"granularity": ChannelGroups(5)},
            "input groups": {"granularity": InputGroups(16)},
            "scale": {"scale": "channel"},
            "scale of groups": {"scale": InputGroups(9)},
            "bfloat16": {"codebook_format": jnp.bfloat16},
            "float8": {"codebook_format": jnp.float8_e4m3fn, "scale": "channel"},
            "fixed": {"codebook_format": QFormat(8, 6)},
            "auto": {"codebook_format": AutoQFormat(8)},
            "zero": {"keep_zero": True},
            "no proof": {"tolerance": None},
            "other axis": {"axis": 0, "granularity": "channel"},
        }.items()
    },
}


def tree():
    """Whole numbers over powers of two, so that every processor draws the same."""
    g = np.random.default_rng(0)
    draw = lambda *shape: (g.integers(-999, 1000, shape) * g.integers(0, 1000, shape) / 2.0**16).astype(np.float32)  # noqa: E731
    return {"conv": draw(3, 3, 4, 24), "dense": draw(64, 30), "half": draw(40, 20).astype(jnp.bfloat16)}


def hashed(cparams):
    """The first digits of a hash of all arrays of a compressed tree."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(cparams):
        digest.update(str(array.dtype).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def compressed(options):
    """The tree, compressed with such options."""
    return nuqjax.compress(tree(), **{"min_size": 1} | options)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_ever(name):
    assert hashed(compressed(CASES[name])) == json.loads(HASHES.read_text())[name]


@pytest.mark.parametrize("name", ["file", "version 3"])
def test_an_old_file_is_read_as_ever(name):
    path = FILE if name == "file" else VERSION_3
    assert hashed(nuqjax.load(path)) == json.loads(HASHES.read_text())[name]


if __name__ == "__main__":
    nuqjax.save(FILE, compressed({"scale": "channel", "codebook_format": jnp.bfloat16}))
    found = {name: hashed(compressed(options)) for name, options in CASES.items()}
    files = {"file": hashed(nuqjax.load(FILE)), "version 3": hashed(nuqjax.load(VERSION_3))}
    HASHES.write_text(json.dumps(found | files, indent=1) + "\n")
