"""A checkpoint on disk, compressed tensor by tensor in little memory. Run it: `python examples/checkpoint_on_disk.py`.

From a shell: `nuqjax compress model.npz small.safetensors --bits 4 --scale channel`.
"""

import tempfile
from pathlib import Path

import numpy as np

import nuqjax

folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
np.savez(folder / "model.npz", **{f"layers/{n}/kernel": rng.normal(size=(256, 256)) for n in range(4)})

report = nuqjax.compress_checkpoint(folder / "model.npz", folder / "small.safetensors", bits=4, scale="channel")
print(report)
cparams = nuqjax.load(folder / "small.safetensors")
print(cparams["layers"]["0"]["kernel"])
# Dense again, for those who have no nuqjax.
nuqjax.write_checkpoint(folder / "dense.npz", nuqjax.open_checkpoint(folder / "small.safetensors"), "npz")
