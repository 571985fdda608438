"""Types of options: what `granularity`, `scale` and `codebook_format` accept."""

from nuqjax._src.leaf.qformat import CodebookFormat
from nuqjax._src.leaf.rows import Granularity, Scale

__all__ = ["CodebookFormat", "Granularity", "Scale"]
