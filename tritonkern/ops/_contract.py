"""Names of `_checks` and `_dtypes` for the operations that still import them from here."""

from tritonkern.ops._checks import check_dense, check_saved
from tritonkern.ops._dtypes import (
    DTYPES,
    accumulator,
    accurate,
    adjacent_channels,
    full_precision,
    on_amd,
    tf32_allowed,
)

__all__ = ["DTYPES", "accumulator", "accurate", "adjacent_channels", "check_dense", "check_saved"]
__all__ += ["full_precision", "on_amd", "tf32_allowed"]

CPP_DTYPES = {dtype: number for number, dtype in enumerate(DTYPES)}
"""Their numbers in csrc/common/tensor.h."""
