"""Fixed-point words: formats, rounding, overflow, and conversion of values to raw integers and back."""

from nuqjax._src.leaf.fixed_point import decode, encode, overflows, requantize
from nuqjax._src.leaf.qformat import OVERFLOW, ROUNDING, AutoQFormat, QFormat, check_modes
from nuqjax._src.leaf.words import rounding_divide_by_power_of_two, saturating_rounding_doubling_high_mul

__all__ = [
    "OVERFLOW",
    "ROUNDING",
    "AutoQFormat",
    "QFormat",
    "check_modes",
    "decode",
    "encode",
    "overflows",
    "requantize",
    "rounding_divide_by_power_of_two",
    "saturating_rounding_doubling_high_mul",
]
