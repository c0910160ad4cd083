"""What every verifier offers, and the pieces that they are built from.

A model maps N token ids at positions start..start+N-1 and its state to features, logits and the new
state. It is built once for each N; rows of a batch have their own `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.models.matrix import Matrix, held
from pcc.tensor import ops as t

Values = np.ndarray[Any, Any]
BYTES = 256


@dataclass(frozen=True)
class StateSpec:
    """One state tensor; `rows_axis` is the per-row axis that holds the rows of a buffer, if any.

    Axes of one `rows_name` have one size in every buffer: a graph that leaves it open names it so.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows_axis: int | None = None
    rows_name: str = "rows"


@dataclass(frozen=True)
class Vocabulary:
    """Which ids mean what: byte b is id b + `byte_offset`; None where ids are not bytes."""

    byte_offset: int | None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    special: tuple[int, ...] = ()


def bytes_at(size: int) -> int | None:
    """Return the id of byte 0 where nothing says it: 256 to 511 ids begin with the bytes."""
    return 0 if BYTES <= size < 2 * BYTES else None


@dataclass(frozen=True)
class Pass:
    """What one pass over N tokens gives.

    `hidden f32[N,D]` verifier features after the final norm; `draft_hidden f32[N,D]` features for
    the head, the same object if no layers are split; `logits f32[N,V]`; `present`: committed-token
    count i64[] -> new states by name.
    """

    hidden: Op
    draft_hidden: Op
    logits: Op
    present: Callable[[Op], dict[str, Op]]


class Model(Protocol):
    """A verifier: vocabulary size V, feature width D, its states and its pass."""

    @property
    def vocab(self) -> int:
        """Number of token ids V."""
        ...

    @property
    def width(self) -> int:
        """Length D of a feature vector."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        ...

    def states(self, rows: int) -> tuple[StateSpec, ...]:
        """Return the state tensors for buffers of `rows` rows."""
        ...

    def forward(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Pass:
        """Process `ids i64[N]` at positions `start i64[]` + 0..N-1, given the states by name."""
        ...


def constant(value: object, dtype: str = "f32", shape: tuple[int, ...] | None = None) -> Op:
    """Return a trained array as a value, perhaps in another `shape`; floats become `dtype`.

    A f32 array in row-major order is taken over, not copied: the caller must drop it. A `Matrix` is
    not read.
    """
    if isinstance(value, Matrix):
        return t.Const(value.array(dtype, value.shape if shape is None else shape))
    a = np.asarray(value)
    a = a if shape is None else a.reshape(shape)
    owned = a.dtype == np.float32 and a.flags.c_contiguous and a.flags.writeable
    if owned and dtype == "f32":
        return t.Const(Array.adopt(a))
    return t.Const(Array.of(a, dtype if a.dtype.kind == "f" else ""))


@dataclass(frozen=True)
class Scaled:
    """The matrix q [D,K] scale [K] of 8-bit integers; operands are rounded to `dtype`."""

    q: Op
    scale: Op
    dtype: str


@dataclass(frozen=True)
class Factored:
    """The matrix `full [D,K] + a [D,r] b [r,K]`; the product of the thin ones is never formed."""

    full: Op | Scaled
    a: Op
    b: Op


Weight: TypeAlias = Op | Scaled | Factored


def dense(x: Op, weight: Weight, bias: Op | None = None) -> Op:
    """y[n,k] = sum_d x[n,d] weight[d,k] (+ bias[1,k]): inputs first, as matrix products want it."""
    if isinstance(weight, Factored):  # x (W + A B) = x W + (x A) B
        y: Op = t.Add(dense(x, weight.full), dense(dense(x, weight.a), weight.b))
    elif isinstance(weight, Scaled):
        y = t.ScaledContract(x, weight.q, weight.scale, "nd,dk->nk", weight.dtype)
    else:
        y = t.Contract(x, weight, "nd,dk->nk")
    return y if bias is None else t.Add(y, bias)


def transposed(*weights: Values | Matrix, dtype: str = "f32") -> Op:
    """Return stored matrices `[K_i, D]` side by side as one constant `[D, sum K_i]` of `dtype`."""
    places = [w if isinstance(w, Matrix) else held(w) for w in weights]
    made = places[0].beside(places[1:], dtype)
    # What is in memory is made now, and held by content.
    small = not any(isinstance(w, Matrix) for w in weights)
    return t.Const(Array.adopt(made.value) if small else made)


def pieces(x: Op, sizes: Sequence[int]) -> list[Op]:
    """Cut `x [N, sum sizes]` into values of these widths."""
    ends = np.cumsum(sizes).tolist()
    return [t.Take(x, 1, tuple(range(e - s, e))) for s, e in zip(sizes, ends, strict=True)]


def split_heads(x: Op, heads: int) -> Op:
    """[N, H * hd] -> [N, H, hd]."""
    count, width = tensor(x).shape
    return t.Reshape(x, (count, heads, width // heads))


def heads_first(x: Op) -> Op:
    """[N, H, hd] -> [H, N, hd]."""
    return t.Transpose(x, (1, 0, 2))


def merge_heads(x: Op) -> Op:
    """[H, N, hd] -> [N, H * hd]."""
    heads, count, width = tensor(x).shape
    return t.Reshape(t.Transpose(x, (1, 0, 2)), (count, heads * width))


def positions_of(start: Op, count: int) -> Op:
    """Return start + 0..count-1 as i64[count]."""
    return t.Add(t.Reshape(start, (1,)), t.Const(Array.of(np.arange(count))))
