"""States on a device: sizes, growth that keeps rows, both kinds of buffers, half precisions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from fake_cuda import Cuda

from pcc.check_generation import _numbers
from pcc.runtime.device.driver import Device
from pcc.runtime.device.states import DeviceStates
from pcc.runtime.dtypes import STORED
from pcc.runtime.saved import _finite

SPECS = [
    {"name": "key.0", "shape": [2, 9, 3], "dtype": "bf16", "rows_axis": 1, "ring": False},
    {"name": "sum.0", "shape": [4, 2], "dtype": "f32", "rows_axis": 0, "ring": False},
    {"name": "ids", "shape": [3], "dtype": "i64", "rows_axis": None, "ring": False},
]
SMALL = {"key.0": [2, 5, 3], "sum.0": [2, 2], "ids": [3]}
LARGE = {s["name"]: s["shape"] for s in SPECS}


def test_growth_keeps_rows_and_adds_zeros() -> None:
    device = Device(0, Cuda())
    states = DeviceStates(device, 1, SPECS, 2)
    states.resize(SMALL)
    assert device.cu.used == states.bytes_for(SMALL)
    rng = np.random.default_rng(0)
    old = {}
    for s in SPECS:
        kind = STORED[str(s["dtype"])]
        old[s["name"]] = rng.integers(0, 1 << 14, (2, *SMALL[str(s["name"])])).astype(kind)
        states.write(str(s["name"]), old[s["name"]])
    states.resize(LARGE)
    assert device.cu.used == states.bytes_for(LARGE)  # the small ones are gone
    key, total = states.read("key.0"), states.read("sum.0")
    assert (key[:, :, :5] == old["key.0"]).all()
    assert not key[:, :, 5:].any()
    assert (total[:, :2] == old["sum.0"]).all()
    assert not total[:, 2:].any()
    assert (states.read("ids") == old["ids"]).all()
    assert states.present["key.0"] is states.past["key.0"]
    assert states.present["ids"].address != states.past["ids"].address
    with pytest.raises(ValueError, match="shape"):
        states.write("ids", np.zeros((2, 4)))


def test_bf16_is_kept_as_its_bits() -> None:
    numbers = np.array([1.5, -2.0, 0.0, 3e38], ml_dtypes.bfloat16)
    bits = numbers.view(np.uint16)
    np.testing.assert_array_equal(_numbers(bits, "bf16"), numbers.astype(np.float64))
    assert _finite(bits, "bf16")
    for wrong in (np.inf, -np.inf, np.nan):
        assert not _finite(np.array([0, wrong], ml_dtypes.bfloat16).view(np.uint16), "bf16")
    assert not _finite(np.array([np.inf], np.float16), "f16")
