"""The types of arrays that graphs and plans name: their bytes, and what numpy calls them."""

from __future__ import annotations

from typing import Any

import numpy as np

# What the host calculates with; bf16 is no type of numpy.
NUMPY: dict[str, Any] = {"f32": np.float32, "i64": np.int64, "bool": np.bool_, "f16": np.float16}
# What the host keeps: of bf16 its bits.
STORED: dict[str, Any] = {**NUMPY, "bf16": np.uint16}
# What buffers of plans hold beside that: packed weights, tables and counters.
PACKED: dict[str, Any] = {"u8": np.uint8, "i8": np.int8, "u32": np.uint32}
ITEM: dict[str, int] = {k: np.dtype(v).itemsize for k, v in {**STORED, **PACKED}.items()}
