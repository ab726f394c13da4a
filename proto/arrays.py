"""Names of the array types that tables, lists and masks are made of; the shape is said where each is used."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int64]
"""int64: page-table entries, page and frame numbers, times in ps, counters."""
Ints = npt.NDArray[np.int32]
"""int32: frame numbers in lists."""
Bytes = npt.NDArray[np.uint8]
"""uint8: flags, kinds of access."""
Mask = npt.NDArray[np.bool_]
"""bool: one answer per page or frame."""
