"""Codebook quantization for JAX: any parameter pytree, k-means levels, the model unchanged."""

from nuqjax import calibration
from nuqjax._src.calibration.door import compress
from nuqjax.apply import apply
from nuqjax.assign import Fit, assign
from nuqjax.calibrate import calibrate
from nuqjax.checkpoint import open_checkpoint, write_checkpoint
from nuqjax.codebook_array import CodebookArray
from nuqjax.codebooks import codebooks, decompress, with_codebooks
from nuqjax.convert import compress_checkpoint
from nuqjax.emulate import Trace, emulate
from nuqjax.emulate_formats import Accumulator, Formats, SiteFormat
from nuqjax.export import Exported, export
from nuqjax.export_onnx import export_onnx
from nuqjax.fisher import fisher
from nuqjax.fit import fit
from nuqjax.fold import fold_batch_norm
from nuqjax.plan import Plan, plan
from nuqjax.qformat import AutoQFormat, QFormat
from nuqjax.report import Report, report
from nuqjax.rows import ChannelGroups, InputGroups
from nuqjax.rules import Rule
from nuqjax.shardings import shardings
from nuqjax.store import inspect, load, save

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
    "with_codebooks",
    "write_checkpoint",
]
