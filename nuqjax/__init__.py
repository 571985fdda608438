"""Codebook quantization for JAX: compresses any parameter pytree to k-means levels and runs the unchanged model."""

from nuqjax import calibration, types
from nuqjax._src.apply.apply import apply
from nuqjax._src.calibration.door import compress
from nuqjax._src.calibration.fisher import fisher
from nuqjax._src.checkpoint.checkpoint import open_checkpoint, write_checkpoint
from nuqjax._src.checkpoint.convert import compress_checkpoint
from nuqjax._src.compress.plan import Plan, plan
from nuqjax._src.compress.rules import Rule
from nuqjax._src.emulate.calibrate import calibrate
from nuqjax._src.emulate.emulate import emulate
from nuqjax._src.emulate.formats import Accumulator, Formats, SiteFormat
from nuqjax._src.emulate.trace import Trace
from nuqjax._src.export.onnx_file import export_onnx
from nuqjax._src.export.program import Exported, export
from nuqjax._src.fit.methods import fit
from nuqjax._src.fold.fold import fold_batch_norm
from nuqjax._src.leaf.assign import Fit, assign
from nuqjax._src.leaf.codebook_array import CodebookArray
from nuqjax._src.leaf.codebooks import codebooks, decompress, with_codebooks
from nuqjax._src.leaf.qformat import AutoQFormat, QFormat
from nuqjax._src.leaf.rows import ChannelGroups, InputGroups
from nuqjax._src.leaf.shardings import shardings
from nuqjax._src.report.report import Report
from nuqjax._src.store.compared import report
from nuqjax._src.store.store import inspect, load, save

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "AutoQFormat",
    "ChannelGroups",
    "CodebookArray",
    "Exported",
    "Fit",
    "Formats",
    "InputGroups",
    "Plan",
    "QFormat",
    "Report",
    "Rule",
    "SiteFormat",
    "Trace",
    "apply",
    "assign",
    "calibrate",
    "calibration",
    "codebooks",
    "compress",
    "compress_checkpoint",
    "decompress",
    "emulate",
    "export",
    "export_onnx",
    "fisher",
    "fit",
    "fold_batch_norm",
    "inspect",
    "load",
    "open_checkpoint",
    "plan",
    "report",
    "save",
    "shardings",
    "types",
    "with_codebooks",
    "write_checkpoint",
]
