"""`pcc doctor` says which driver and GPUs there are, or in one line why there is none."""

from __future__ import annotations

import pytest
from fake_cuda import Cuda

import pcc.environment as environment
from pcc.runtime.device import driver


def test_gpus_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda name: "13.0")
    cu = Cuda(memory=3 << 30, capability=(8, 6))
    monkeypatch.setattr(driver, "bindings", lambda: cu)
    found = {f.name: f for f in environment._gpu()}
    assert found["NVIDIA driver"].version == "CUDA 13.0"
    assert found["GPU 0"].version == "Fake GPU, sm_86, 3.0 GB of 3.0 GB free"
    cu.fails["cuInit"] = 100
    (only,) = environment._gpu()
    assert (only.state, only.required) == ("there is no GPU", False)
    monkeypatch.setattr(environment, "installed", lambda name: "")
    assert environment._gpu() == []
