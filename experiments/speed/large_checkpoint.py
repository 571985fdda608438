"""A checkpoint larger than memory may be, through the command line: killed half-way, resumed, and compared.

    python -m experiments.speed.large_checkpoint --folder FOLDER --gigabytes 8

Makes a sharded bfloat16 checkpoint as a language model has it (once: it is kept in the folder), compresses it by
`nuqjax compress`, compresses it again with a SIGKILL half-way and `--resume`, and says the seconds and the most memory
that each run had. `--only make|whole|killed|resumed|compared` does one step, for those that take long.
"""

import argparse
import filecmp
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from experiments.record.results import circumstances, write

STEPS = ("make", "whole", "killed", "resumed", "compared")
_WIDTH = 4096


def tensors(gigabytes: float) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes, in bfloat16 about so many times 10⁹ bytes: an embedding, then layers of 405 million bytes."""
    yield "model.embed_tokens.weight", (32_000, _WIDTH)
    left, layer = gigabytes * 1e9 - 2 * 32_000 * _WIDTH, 0
    while left > 0:
        for name, shape in (
            ("self_attn.q_proj", (_WIDTH, _WIDTH)), ("self_attn.k_proj", (_WIDTH, _WIDTH)),
            ("self_attn.v_proj", (_WIDTH, _WIDTH)), ("self_attn.o_proj", (_WIDTH, _WIDTH)),
            ("mlp.gate_proj", (11_008, _WIDTH)), ("mlp.up_proj", (11_008, _WIDTH)), ("mlp.down_proj", (_WIDTH, 11_008)),
        ):  # fmt: skip
            yield f"model.layers.{layer}.{name}.weight", shape
            left -= 2 * shape[0] * shape[1]
        layer += 1


def make(folder: Path, gigabytes: float) -> None:
    """The checkpoint: a shard for the embedding and each layer, and their index."""
    shards: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for name, shape in tensors(gigabytes):
        shards.setdefault(name.split(".")[2] if "layers" in name else "embed", []).append((name, shape))
    weight_map = {}
    for number, (key, members) in enumerate(shards.items()):
        shard = f"model-{number:05}.safetensors"
        weight_map |= {name: shard for name, _ in members}
        if not (folder / shard).exists():
            rng = np.random.default_rng(number)
            made = {name: (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
                    for name, shape in members}  # fmt: skip
            safetensors.numpy.save_file(made, folder / f"{shard}.part")
            os.replace(folder / f"{shard}.part", folder / shard)
        print(f"shard {number + 1} of {len(shards)} ({key})", flush=True)
    total = sum(2 * shape[0] * shape[1] for _, shape in tensors(gigabytes))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def compress(folder: Path, target: str, options: Sequence[str], kill: bool = False) -> dict[str, Any]:
    """`nuqjax compress` in a process of its own: its seconds, and its most memory in bytes."""
    source = str(folder / "model.safetensors.index.json")
    command = [sys.executable, "-m", "nuqjax", "compress", source, str(folder / target), "--output-axis", "0",
               "--quiet", *options]  # fmt: skip
    count = len(json.loads(Path(source).read_text())["weight_map"])
    start = time.perf_counter()
    process = subprocess.Popen(command)
    if kill:
        journal = folder / f"{target}.partial" / "journal"

        def watch() -> None:
            while process.returncode is None:
                if journal.exists() and journal.read_bytes().count(b"\n") > count // 2:
                    os.kill(process.pid, signal.SIGKILL)
                    return
                time.sleep(0.05)

        threading.Thread(target=watch, daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode != (-signal.SIGKILL if kill else 0):
        raise RuntimeError(f"the command ended with {process.returncode}")
    return {"options": list(options), "seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.large_checkpoint",
        description="A large checkpoint compressed, killed and resumed.",
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is made and compressed")
    parser.add_argument("--gigabytes", type=float, default=8, help="its size in 10⁹ bytes (default: 8)")
    parser.add_argument("--only", choices=STEPS, help="one step; the others were done before")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("options", nargs="*", help="for nuqjax compress, behind --; default: --bits 4")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    options = args.options or ["--bits", "4"]
    found: dict[str, Any] = {}
    if args.json is not None and args.json.exists():
        found = json.loads(args.json.read_text())
    for step in STEPS if args.only is None else [args.only]:
        if step == "make":
            make(args.folder, args.gigabytes)
            found["gigabytes"] = sum(2 * a * b for _, (a, b) in tensors(args.gigabytes)) / 1e9
        elif step == "compared":
            first, second = args.folder / "whole.safetensors", args.folder / "killed.safetensors"
            found["bytes"] = first.stat().st_size
            found["identical"] = filecmp.cmp(first, second, shallow=False)
            print(f"{found['bytes']:,} bytes; resumed file identical: {found['identical']}")
        else:
            target = "whole.safetensors" if step == "whole" else "killed.safetensors"
            more = [*options, "--resume"] if step == "resumed" else options
            found[step] = compress(args.folder, target, more, kill=step == "killed")
            print(
                f"{step}: {found[step]['seconds']:.1f} s, at most {found[step]['peak_bytes'] / 1e9:.2f} GB", flush=True
            )
        if args.json is not None:
            words = f"python -m experiments.speed.large_checkpoint --folder FOLDER --gigabytes {args.gigabytes:g}"
            write(args.json, {"commands": [words], **circumstances("jax", "nuqjax", "numpy")} | found)
    return 0 if found.get("identical", True) else 1


if __name__ == "__main__":
    sys.exit(main())
