"""Random values on a GPU, and how close results must be."""

from __future__ import annotations

import torch

STEP = {"f16": 2.0**-10, "bf16": 2.0**-7, "f32": 2.0**-23}  # distance of neighbours at 1


def normal(*shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def close(got, want, error):
    """Compare relative to the size of the whole: NaN is never close."""
    got, want = got.double(), want.double()
    assert torch.isfinite(got).all()
    assert float((got - want).norm() / want.norm()) < error
    assert float((got - want).abs().max()) < 20 * error * float(want.abs().max())
