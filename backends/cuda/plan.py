"""What the engine of our own reads: one plan for each graph, `engines/cuda/<graph>.json`.

A plan lists buffers and kernel launches. Launches run in order, each over buffers by index; every
size is a constant of the kernel, so a launch takes pointers only. Kinds of buffers:

| kind | lies | name |
|---|---|---|
| `input`, `output` | where the caller binds it | `name` of the manifest, of an output `onnx` |
| `state` | where the caller binds it | `key.0`: one buffer, past and present at once; `past.X` and `present.X` where a state has no axis of rows |
| `weight` | at `offset` of `engines/cuda/weights.bin` | a digest of its contents and layout |
| `scratch` | at `offset` of an arena of `scratch_bytes` | free |

No two buffers of a plan have one name. Arrays are dense, in row-major order, with the batch axis first. `zero` says that a scratch buffer
must hold zeros before the first launch of all; kernels leave it so.
"""  # noqa: E501

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = 1
KINDS = ("input", "output", "state", "weight", "scratch")
# As `pcc.runtime.dtypes` has it, which no backend imports.
ITEM = {"f32": 4, "i64": 8, "bool": 1, "f16": 2, "bf16": 2, "u8": 1, "i8": 1, "u32": 4}
ALIGN = 256  # of every offset: what the driver gives to an allocation of its own


def aligned(size: int) -> int:
    """Return `size` rounded up to a multiple of `ALIGN`."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class Buffer:
    """A dense array on the device."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    zero: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * ITEM[self.dtype]


@dataclass(frozen=True)
class Launch:
    """One kernel over buffers by index.

    `overlap`: it waits for the launches before it by itself, and may be launched with programmatic
    stream serialization. `bytes` that it must move: `weights`, `activations`, and for attention
    `kv_row` for each row of a cache that it reads, of `kv_rows` at most.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[int, ...]
    shared: int = 0
    cooperative: bool = False
    overlap: bool = False
    op: str = ""
    layer: str = ""
    bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Launches of one graph at one batch size, divided for so many multiprocessors."""

    graph: str
    batch: int
    arch: str
    multiprocessors: int
    cubin: str
    scratch_bytes: int
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]

    def document(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        buffers = [{**asdict(b), "shape": list(b.shape), "bytes": b.bytes} for b in self.buffers]
        return {
            "version": VERSION,
            "graph": self.graph,
            "batch": self.batch,
            "arch": self.arch,
            "multiprocessors": self.multiprocessors,
            "cubin": self.cubin,
            "weights": "engines/cuda/weights.bin",
            "scratch_bytes": self.scratch_bytes,
            "buffers": buffers,
            "launches": [asdict(x) for x in self.launches],
        }

    def dumps(self) -> bytes:
        """Return the file: one buffer or launch a line, so that it can be read and compared."""
        doc = self.document()
        parts = [json.dumps({k: v for k, v in doc.items() if not isinstance(v, list)})[1:-1]]
        for key in ("buffers", "launches"):
            lines = ",\n".join(map(json.dumps, doc[key]))
            parts.append(f'"{key}": [\n{lines}\n]')
        return ("{" + ",\n".join(parts) + "}\n").encode()
