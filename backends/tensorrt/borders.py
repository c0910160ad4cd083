"""Floats that enter or leave an engine stay floats, where types are hints.

8.6 offers a fused block twice: with all of its floats in single, or all in half precision, and may
take the second, with conversions around it, whatever the layers within are pinned to. Of the draft
of an HMM u, the context and q itself were halves so, and sums of q off by 2.2e-4.

A graph whose inputs and outputs are float32 gets the formats that its callers have and the flag
that forbids conversions there (`DIRECT_IO`). One with halves among them, the caches of a verifier,
has no block that conforms: there a selector takes the offer without halves. Caches are then
converted on their way in and out: nothing is lost, and it takes time (docs/tensorrt.md).
"""

from __future__ import annotations

from typing import Any

REFUSED = "kDIRECT_IO"  # in what is said where inputs and outputs cannot be kept as they are
BLOCK = "ForeignNode"  # in the name of a fused block


def keep(network: Any, config: Any, module: Any) -> Any:
    """Let no float be converted to half and back; return what must live while it is built."""
    borders = [network.get_input(i) for i in range(network.num_inputs)]
    borders += [network.get_output(i) for i in range(network.num_outputs)]
    kinds = {x.dtype.name for x in borders}
    if "FLOAT" not in kinds:
        return None
    if "HALF" in kinds:
        return choose(config, module)
    linear = 1 << int(module.TensorFormat.LINEAR)
    for x in borders:
        if x.dtype.name == "FLOAT":  # of other types nothing is lost
            x.allowed_formats = linear
    config.set_flag(module.BuilderFlag.DIRECT_IO)
    return None


def choose(config: Any, module: Any) -> Any:
    """Let fused blocks take their floats in single precision where that is offered."""

    class Selector(module.IAlgorithmSelector):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IAlgorithmSelector.__init__(self)

        def select_algorithms(self, context: Any, choices: Any) -> list[int]:
            count = context.num_inputs + context.num_outputs
            return offers(context.name, [_types(x, count) for x in choices])

        def report_algorithms(self, contexts: Any, choices: Any) -> None:
            pass

    config.algorithm_selector = Selector()
    return config.algorithm_selector


def offers(name: str, kinds: list[list[str]]) -> list[int]:
    """Return which offers for a layer are taken: of a fused block those without halves, if any."""
    whole = [i for i, types in enumerate(kinds) if "HALF" not in types]
    return whole if BLOCK in name and whole else list(range(len(kinds)))


def _types(algorithm: Any, count: int) -> list[str]:
    """Return the types of what an algorithm reads and writes."""
    found = (algorithm.get_algorithm_io_info(i) for i in range(count))
    return [str(x.dtype).rpartition(".")[2] for x in found]
