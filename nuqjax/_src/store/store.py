"""Saves and loads compressed trees: safetensors files whose metadata hold the structure and the layout as JSON.

`docs/format.md` describes the format so that a few lines of NumPy can read it. A file holds data only, no pickle and
no code; everything in it is checked before it is used.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import nearest, path_name
from nuqjax._src.report.report import Report
from nuqjax._src.store.entropy import encode, sized
from nuqjax._src.store.entry import Entry
from nuqjax._src.store.file import Bundle, Stored, open_bundle, shard_size
from nuqjax._src.store.layout import LayoutBuilder, metadata, read_layout
from nuqjax._src.store.place import placed, placed_alike, places_of
from nuqjax._src.store.report import report_entry, report_from_json
from nuqjax._src.store.target import Target
from nuqjax._src.store.tree import Structure, tree_to_nodes
from nuqjax._src.store.write import header, write


def save(
    path: str | os.PathLike[str],
    cparams: Any,
    *,
    report: Report | None = None,
    entropy_coding: bool = False,
    max_shard_size: int | str | None = None,
) -> None:
    """Saves a tree, compressed or not, bit for bit.

    The file is written under a temporary name, flushed to disk and renamed, so an interrupted save leaves the old file
    whole. Arrays keep their dtypes; Python numbers and strings keep their types. For a leaf that no file can hold (a
    function), the file stores the type's name, and `load(…, like=…)` takes the leaf from `like`.

    Args:
      path: the file to write, by convention `….safetensors`. An existing file is replaced; its permissions are kept.
      cparams: any pytree whose dicts have keys that are strings, integers or tuples of these.
      report: the `Report` of the tree, stored in the same file.
      entropy_coding: entropy-code the indices where that is smaller; needs the `entropy` extra. Memory use does not
        change, because the indices are packed again when the file is loaded.
      max_shard_size: a number of bytes or a string such as `"5GB"`. Tensors of more bytes in total are split over
        several files with an index, `PATH.index.json`, as on the Hugging Face Hub.

    Raises:
      ValueError: a leaf or a key is of a type or dtype that the format does not hold, a leaf's arrays do not fit its
        layout, or the report is of another tree.
      OSError: the file cannot be written; another process is writing it; the path is a directory or a device; or files
        with its name that this library did not write would be hidden, replaced or removed.
      ImportError: entropy coding is asked for without `constriction`.

    >>> import jax.numpy as jnp, nuqjax, pathlib, tempfile
    >>> cparams = nuqjax.compress({"kernel": jnp.arange(4096.0).reshape(64, 64)}, bits=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(pathlib.Path(folder) / "model.safetensors", cparams)
    ...     same = load(pathlib.Path(folder) / "model.safetensors")
    >>> same["kernel"], bool((same["kernel"].packed == cparams["kernel"].packed).all())
    (CodebookArray(float32[64, 64], bits=4, granularity='tensor', 2112 bytes), True)
    """
    save_at(path, cparams, report, entropy_coding, shard_size(max_shard_size))


def save_by_name(path: str | os.PathLike[str], cparams: Any) -> None:
    """Saves like `save`, but joins no small tensors: each has its own name, for readers that do not know nuqjax."""
    save_at(path, cparams, pooled=False)


def save_at(
    path: str | os.PathLike[str] | Target,
    cparams: Any,
    report: Report | None = None,
    entropy_coding: bool = False,
    limit: int | None = None,
    pooled: bool = True,
) -> None:
    """Saves like `save`, at a path or at a target that is claimed already.

    Args:
      path: the file, or the claimed target.
      cparams: the tree.
      report: as in `save`.
      entropy_coding: as in `save`.
      limit: bytes of tensors in a shard.
      pooled: whether small tensors are joined.
    """
    tensors, text = _laid_out(cparams, report, encode if entropy_coding else None, limit, pooled)
    write(path, tensors, *metadata(text), limit)


def _laid_out(cparams, report, code, limit, pooled) -> tuple[list[Stored], str]:
    """Returns the tensors of a tree and the text of its layout."""
    nodes, leaves = tree_to_nodes(cparams)
    layout = LayoutBuilder(nodes)
    tensors = [tensor for name, leaf in leaves for tensor in layout.add(name, leaf, code)]
    if pooled:
        tensors = layout.pool(tensors, limit)
    text = layout.text(report)
    Structure(nodes, len(text))  # raises for a structure that `load` would refuse
    return tensors, text


def file_sizes(cparams: Any) -> tuple[int, int] | None:
    """Returns the bytes of the files that `save` writes, without and with entropy coding; nothing is coded for it.

    The first number is exact, the second to a few bytes for each leaf. None where no file holds the tree, or where not
    all of it is on this host.

    >>> import jax.numpy as jnp, nuqjax, os, tempfile
    >>> cparams = nuqjax.compress({"kernel": jnp.arange(4096.0).reshape(64, 64)}, bits=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(os.path.join(folder, "model.safetensors"), cparams)
    ...     file_sizes(cparams)[0] == os.path.getsize(os.path.join(folder, "model.safetensors"))
    True
    """
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(cparams)):
        return None
    try:
        made = [_laid_out(cparams, None, code, None, True) for code in (None, sized)]
    except ValueError:
        return None
    plain, coded = (
        len(header(tensors, metadata(text)[0])[0]) + sum(tensor.nbytes for tensor in tensors) for tensors, text in made
    )
    return plain, coded


def load(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    leaves: str | Callable[[str], bool] | None = None,
    sharding: Any = None,
    numpy: bool = False,
    verify: bool = True,
) -> Any:
    """Loads a tree that `save` wrote.

    Dicts, lists, tuples and None come back as they were. Any other node (a Flax `FrozenDict` or NNX state, a named
    tuple, an equinox module) needs its class, which no file holds: `like` provides it. Without `like` the node comes
    back as a dict of its children by name.

    The file is mapped, and only the requested tensors are read.

    Args:
      path: the file, or the name under which shards were saved, or their index.
      like: a tree of the wanted structure, of arrays, `jax.ShapeDtypeStruct` or compressed leaves, or its `PyTreeDef`.
        Shapes and dtypes are compared; a leaf that the file could not hold is taken from `like`.
      leaves: the leaves to load: a regular expression that is searched for in their paths, or a function of the path.
        The other leaves come back as None.
      sharding: where to place arrays: one `jax.sharding.Sharding` for all, or a tree of `NamedSharding` as for the
        dense parameters, matched by path (see `nuqjax.shardings`). Each device receives only its part.
      numpy: return NumPy arrays, which are read-only views of the mapped file where possible.
      verify: compare the checksums of the loaded tensors, which reads every byte of them.

    Returns:
      The tree, with JAX arrays. Arrays of 64-bit dtypes stay NumPy arrays unless x64 is on, because JAX would round
      them; so do arrays of dtypes that JAX does not hold (float6).

    Raises:
      ValueError: the file is damaged, was not written by `save`, or has a newer version; the tree differs from `like`;
        no leaf matches. The message names the entry.
      OSError: there is no such file.
      ImportError: the file is entropy-coded and `constriction` is not installed.

    >>> import jax.numpy as jnp, nuqjax, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "model.safetensors"
    ...     nuqjax.save(path, {"hidden": jnp.ones(3), "out": jnp.zeros(2)})
    ...     load(path, leaves="^out")
    {'hidden': None, 'out': Array([0., 0.], dtype=float32)}
    """
    return from_bundle(open_bundle(path), like=like, leaves=leaves, sharding=sharding, numpy=numpy, verify=verify)


def from_bundle(
    bundle: Bundle,
    *,
    like: Any = None,
    leaves: str | Callable[[str], bool] | None = None,
    sharding: Any = None,
    numpy: bool = False,
    verify: bool = True,
) -> Any:
    """Loads a tree as `load` does, from open files."""
    structure, entries, _ = read_layout(bundle, verify)
    wanted = _wanted(leaves, structure.paths, bundle.name)
    template, treedef = _template(like, entries, bundle.name)
    if sharding is not None and numpy:
        raise ValueError("load: sharding= places JAX arrays, but numpy=True asks for NumPy arrays; give one of them")
    places = places_of(sharding, [e for e, w in zip(entries, wanted, strict=True) if w and e.tensors])
    found = []
    for number, (entry, is_wanted) in enumerate(zip(entries, wanted, strict=True)):
        if not is_wanted:
            found.append(None)
        elif entry.kind == "absent":
            found.append(entry.read(verify) if treedef is None else template[number])
        elif entry.same_as is not None and found[entry.same_as] is not None and placed_alike(entry, entries, places):
            found.append(found[entry.same_as])
        else:
            leaf = entry.read(verify)
            found.append(leaf if numpy else placed(leaf, places.get(entry.path)))
    try:
        return structure.build(found) if treedef is None else treedef.unflatten(found)
    except ValueError as error:
        raise ValueError(f"{bundle.name}: {error}") from error


def _wanted(leaves: str | Callable[[str], bool] | None, paths: Sequence[str], name: str) -> list[bool]:
    if leaves is None:
        return [True] * len(paths)
    if isinstance(leaves, str):
        try:
            pattern = re.compile(leaves)
        except re.error as error:
            raise ValueError(f"load: leaves={leaves!r} is not a regular expression: {error}") from error
        wanted = [pattern.search(path) is not None for path in paths]
    else:
        wanted = [bool(leaves(path)) for path in paths]
    if not any(wanted):
        near = nearest(str(leaves), paths)
        shown = f"leaves={leaves!r} matches" if isinstance(leaves, str) else "the function leaves=… picks"
        raise ValueError(
            f"{name}: {shown} none of the {len(paths)} leaves; the nearest paths are {', '.join(map(repr, near))}"
        )
    return wanted


def _template(like: Any, entries: Sequence[Entry], name: str) -> tuple[list[Any], Any]:
    """Returns the leaves and the structure of `like`; raises ValueError where they differ from the file's."""
    if like is None:
        return [], None
    if isinstance(like, jax.tree_util.PyTreeDef):
        like = like.unflatten(range(like.num_leaves))
    flat, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_codebook_array)
    given, saved = [path_name(path) for path, _ in flat], [entry.path for entry in entries]
    if given != saved:
        for what, here, there in (("has no", saved, set(given)), ("has a", given, set(saved))):
            wrong = [path for path in here if path not in there]
            if wrong:
                raise ValueError(
                    f"{name}: like {what} leaf {wrong[0]!r}, {'unlike' if here is given else 'as has'} the file"
                )
        raise ValueError(f"{name}: like has the file's leaves in another order")
    for entry, (_, leaf) in zip(entries, flat, strict=True):
        saved_as = entry.shape_and_dtype()
        if saved_as is not None and hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            wanted = tuple(leaf.shape), np.dtype(leaf.dtype).name
            if wanted != saved_as and not (entry.kind == "codebook" and saved_as == _as_compressed(leaf)):
                raise ValueError(
                    f"{entry.where}: {saved_as[1]}{list(saved_as[0])}, but like has {wanted[1]}{list(wanted[0])}"
                )
    return [leaf for _, leaf in flat], treedef


def _as_compressed(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype of a dense leaf as `compress` sees it: float64 counts as float32 unless x64 is on."""
    return tuple(leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype).name


def inspect(path: str | os.PathLike[str], *, verify: bool = True) -> Report:
    """Returns the report of a saved tree: the stored one, or else one computed from the file alone.

    Without a stored report, errors and methods are unknown; sizes, levels and entropies are known. The report's
    `nbytes_file` is the size of the file on disk, header included.

    Args:
      path: as in `load`.
      verify: compare checksums.

    Raises:
      ValueError: the file is damaged, or was not written by `save`.
      OSError: there is no such file.

    >>> import jax.numpy as jnp, nuqjax, tempfile, os
    >>> cparams = nuqjax.compress({"kernel": jnp.arange(4096.0).reshape(64, 64)}, bits=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(os.path.join(folder, "model.safetensors"), cparams)
    ...     inspect(os.path.join(folder, "model.safetensors")).total["nbytes_after"]
    2112
    """
    bundle = open_bundle(path)
    files = {bundle.name, *(file.name for file in bundle.files.values())}
    return replace(inspect_bundle(bundle, verify), nbytes_file=sum(map(os.path.getsize, files)))


def inspect_bundle(bundle: Bundle, verify: bool) -> Report:
    """Returns the report as `inspect` does, from open files; `nbytes_file` is not set."""
    _, entries, report = read_layout(bundle, verify)
    if report is not None:
        return report_from_json(report, bundle.name)
    return Report(tuple(report_entry(entry, verify) for entry in entries))
