"""The words and the floats of parameters and constants."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.emulate.program import MOVING, Node
from nuqjax._src.leaf import fixed_point
from nuqjax._src.leaf.codebook_array import CodebookArray, decode, is_codebook_array, level_values
from nuqjax._src.leaf.qformat import QFormat
from nuqjax._src.platform.compat import enable_x64


class Parameters:
    """Computes the words and the floats of parameters and constants where they are needed."""

    def __init__(self, arrays: Mapping[Node, Any]) -> None:
        self._arrays = arrays

    def floats(self, node: Node) -> Any:
        """Returns the value that the function computes from the decoded leaves."""
        if node.op == "constant":
            return jnp.asarray(node.value)
        if node.op == "leaf":
            x = self._arrays[node]
            return decode(x) if is_codebook_array(x) else jnp.asarray(x)
        with enable_x64(False):
            return node.floating(*(self.floats(n) for n in node.inputs))

    def words(self, node: Node, fmt: QFormat) -> jax.Array:
        """Returns raw words: a leaf's are looked up in its codebook; a value computed from leaves is rounded."""
        if node.op in MOVING and node.role == "parameter" and node.inputs[0].real:
            [inner, *rest] = node.inputs
            if node.op == "index" and inner.op == "leaf" and _is_stacked(self._arrays[inner]):
                return leaf_words(self._arrays[inner][node.index], fmt)
            if node.op in ("convert_element_type", "reduce_precision"):
                return self.words(inner, fmt)
            return node.floating(self.words(inner, fmt), *(self.floats(n) for n in rest))
        if node.op == "leaf" and is_codebook_array(self._arrays[node]):
            return leaf_words(self._arrays[node], fmt)
        return fixed_point.encode(self.floats(node), fmt)


def _is_stacked(x: Any) -> bool:
    return isinstance(x, CodebookArray) and bool(x.stack_shape)


def leaf_words(leaf: CodebookArray, fmt: QFormat) -> jax.Array:
    """Returns a compressed leaf's words: levels rounded once (half even, saturating), looked up by the indices."""
    if leaf.scale is not None:  # scaled levels do not form a small table, so every weight is rounded
        return fixed_point.encode(decode(leaf), fmt)
    words = leaf.levels if leaf.codebook_format == fmt else fixed_point.encode(level_values(leaf), fmt)
    raw = replace(leaf, levels=words.astype(jnp.int32), codebook_format=None, dtype=np.dtype(np.int32))
    return decode(raw)
