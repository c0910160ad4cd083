"""Modules run by generated kernels on a CPU, beside their float64 meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcc.backends.cuda.codegen import Generated, generate
from pcc.backends.cuda.codegen.host import Host
from pcc.interp.run import run
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Real
from pcc.tensor.ops import Input

Values = np.ndarray[Any, Any]
DTYPES = {"f32": np.float32, "i64": np.int64, "bool": np.bool_, "f16": np.float16,
          "u8": np.uint8, "u32": np.uint32}  # fmt: skip


def dtype_of(name: str) -> Any:
    """The numpy type of a stored dtype."""
    if name == "bf16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return DTYPES[name]


class Kernels:
    """Modules at one batch size: one kernel each, all in one library."""

    def __init__(self, modules: Sequence[Module], batch: int, **host: Any) -> None:
        self.modules = {f"k{i}": m for i, m in enumerate(modules)}
        self.batch = batch
        self.inputs = {
            k: [n for n in m.nodes() if isinstance(n, Input)] for k, m in self.modules.items()
        }
        self.made: dict[str, Generated] = {
            k: generate(k, list(m.nodes()), self.inputs[k], m.roots, batch)
            for k, m in self.modules.items()
        }
        self.host = Host(list(self.made.values()), **host)

    def __call__(self, i: int, feed: Mapping[str, Values], seed: int = 0) -> dict[str, Values]:
        """What kernel `i` answers, by output name; unused memory holds garbage."""
        key = f"k{i}"
        kernel, module = self.made[key], self.modules[key]
        buffers: list[Values] = [
            np.ascontiguousarray(
                np.broadcast_to(np.asarray(feed[n.key]), self._shape(n)), dtype_of(n.dtype)
            )
            for n in self.inputs[key]
        ]
        outs = [garbage(self._shape(n), dtype_of(tensor(n).dtype)) for n in module.roots]
        buffers += outs
        buffers += [np.ascontiguousarray(a.value) for a in kernel.constants]
        for a in kernel.args[len(buffers) :]:
            new = garbage((int(np.prod(a.shape)),), dtype_of(a.dtype))
            if a.zero:
                new[:] = 0
            buffers.append(new)
        self.host(key, buffers, seed)
        if kernel.args and kernel.args[-1].zero:
            assert not buffers[-1].any(), "a barrier is not left as it was found"
        return {name: y for (name, _), y in zip(module.outputs, outs, strict=True)}

    def _shape(self, n: Op) -> tuple[int, ...]:
        t = tensor(n)
        return (self.batch, *t.shape) if t.batch else t.shape

    def meaning(self, i: int, feed: Mapping[str, Values]) -> dict[str, Values]:
        """What the evaluator answers in float64."""
        module = self.modules[f"k{i}"]
        with np.errstate(invalid="raise"):
            values = run(module.roots, dict(feed), Real())
        shaped = (
            np.broadcast_to(v, self._shape(n)) for v, n in zip(values, module.roots, strict=True)
        )
        return dict(zip([name for name, _ in module.outputs], shaped, strict=True))


def garbage(shape: tuple[int, ...], dtype: Any) -> Values:
    """An array of bytes that no result has."""
    out = np.empty(shape, dtype)
    out.reshape(-1).view(np.uint8)[:] = 0xA5
    return out
