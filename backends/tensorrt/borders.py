"""Floats that enter or leave an engine stay floats, where types are hints.

8.6 may give a fused block its floats in half precision, with conversions around it, whatever the
layers within are pinned to. Of the draft of an HMM u, the context and q itself were halves so, and
sums of q off by 2.2e-4. So a graph whose inputs and outputs are float32 gets the formats that its
callers have, and the flag that forbids conversions there (`DIRECT_IO`). One with halves among them,
the caches of a verifier, has no implementation then: it is built as it is, and looked into
(`stored`).
"""

from __future__ import annotations

from typing import Any

REFUSED = "kDIRECT_IO"  # in what is said where inputs and outputs cannot be kept as they are


def keep(network: Any, config: Any, module: Any) -> None:
    """Let no float be converted on its way in or out, if none is a half."""
    borders = [network.get_input(i) for i in range(network.num_inputs)]
    borders += [network.get_output(i) for i in range(network.num_outputs)]
    kinds = {x.dtype.name for x in borders}
    if "FLOAT" not in kinds or "HALF" in kinds:
        return
    linear = 1 << int(module.TensorFormat.LINEAR)
    for x in borders:
        if x.dtype.name == "FLOAT":  # of other types nothing is lost
            x.allowed_formats = linear
    config.set_flag(module.BuilderFlag.DIRECT_IO)
