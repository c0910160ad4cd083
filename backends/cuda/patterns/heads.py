"""The inputs of attention: queries, keys and values of all heads, beside one another."""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.graph import Graph, half
from pcc.backends.cuda.patterns.terms import only_multiplied
from pcc.backends.cuda.piece import Offers, Output, Want
from pcc.ir.core import Op, tensor
from pcc.models.base import positions_of
from pcc.tensor import eva, nn
from pcc.tensor import ops as t

SWAP = (1, 0, 2)
MOST_WIDTH, STEP = 128, 16  # of a head: what the kernels take
MOST_POSITIONS = 128  # of one pass: the kernels hold them in shared memory


@dataclass(frozen=True)
class Heads:
    """`joined` [N,(H+2Hk) hd] holds what attention turns by the tables, writes and reads."""

    joined: Op
    cos: t.Const | None
    sin: t.Const | None

    @property
    def angles(self) -> int:
        """Number of frequencies; 0: nothing is turned."""
        return self.cos.value.shape[1] if self.cos is not None else 0

    @property
    def positions(self) -> int:
        """Rows of the tables."""
        return self.cos.value.shape[0] if self.cos is not None else 0

    def given(self, out: Output) -> dict[str, int]:
        """Return the buffers by argument."""
        args = {"qkv": out.value(self.joined, "f32")}
        if self.cos is not None and self.sin is not None:
            args |= {"cos": out.array(self.cos.value), "sin": out.array(self.sin.value)}
        return args


@dataclass(frozen=True)
class Attended:
    """root [N,H hd] = the heads of an attention `of` beside one another, rounded.

    `states`: the caches that its one launch writes, in the order of the kernel's arguments.
    """

    root: Op
    inputs: Heads
    states: tuple[Op, ...]
    of: nn.CachedAttention | eva.EvaAttention

    @property
    def forms(self) -> frozenset[str]:
        """Rounded to the dtype of the caches."""
        return frozenset({half(self.of.k)})

    def needs(self, graph: Graph, offers: Offers) -> list[Want]:
        """Queries, keys and values of the new positions, and where they are."""
        return [(self.inputs.joined, "f32"), (self.of.start, "i64")]


def merged(op: Op, graph: Graph) -> Op | None:
    """Return y [H,N,hd] where `op` is y with positions first and heads beside one another.

    Nobody else may read y, and every reader of `op` must round it: kernels write it rounded.
    """
    if not isinstance(op, t.Reshape) or not isinstance(op.x, t.Transpose) or op.x.perm != SWAP:
        return None
    y = op.x.x
    heads, count, width = tensor(y).shape
    right = op.shape == (count, heads * width) and tensor(op).batch == "b"
    alone = graph.single(op.x) and graph.single(y) and only_multiplied(op, graph)
    sizes = width % STEP == 0 and width <= MOST_WIDTH and count <= MOST_POSITIONS
    return y if right and alone and sizes else None


def heads(q: Op, k: Op, v: Op, start: Op) -> Heads | None:
    """Return the inputs of attention from its turned queries and keys, and its values.

    Equal because a rotation acts on each head by itself, and the order of heads and positions is
    that of the axes of `joined`.
    """
    (q3, turn_q), (k3, turn_k), (v3, turn_v) = _untwisted(q), _untwisted(k), _untwisted(v)
    if q3 is None or k3 is None or v3 is None or turn_v is not None:
        return None
    if (turn_q is None) != (turn_k is None):
        return None
    joined = _joined((q3, k3, v3))
    if turn_q is None or turn_k is None:
        return Heads(joined, None, None)
    at = positions_of(start, tensor(q).shape[1])
    same = turn_q.positions is turn_k.positions is at
    same = same and turn_q.cos is turn_k.cos and turn_q.sin is turn_k.sin
    if not same or not isinstance(turn_q.cos, t.Const) or not isinstance(turn_q.sin, t.Const):
        return None
    return Heads(joined, turn_q.cos, turn_q.sin)


def _untwisted(x: Op) -> tuple[Op | None, nn.Rotary | None]:
    """Return x before its rotation and with positions first, and the rotation."""
    turn = x if isinstance(x, nn.Rotary) else None
    x = turn.x if turn is not None else x
    first = isinstance(x, t.Transpose) and x.perm == SWAP
    return (x.x if first and isinstance(x, t.Transpose) else None), turn


def _joined(parts: tuple[Op, ...]) -> Op:
    """Return the value that `parts` [N,h,hd] are cut from side by side, or one made of them."""
    flat: list[Op] = []
    for x in parts:
        count, number, width = tensor(x).shape
        plain = isinstance(x, t.Reshape) and x.x.type == t.Reshape(x, (count, number * width)).type
        flat.append(
            x.x if plain and isinstance(x, t.Reshape) else t.Reshape(x, (count, number * width))
        )
    whole = flat[0].x if isinstance(flat[0], t.Take) else None
    columns: list[int] = []
    for x in flat:
        if not isinstance(x, t.Take) or x.axis != 1 or x.x is not whole:
            return t.Concat(tuple(flat), 1)
        columns += x.indices
    if whole is None or columns != list(range(tensor(whole).shape[1])):
        return t.Concat(tuple(flat), 1)
    return whole


def cache(op: Op, kind: type[nn.RowWrite], start: Op, graph: Graph) -> nn.RowWrite | None:
    """Return `op` as the write at `start` into a half state that has one buffer."""
    right = isinstance(op, kind) and op.start is start and op in graph.in_place and half(op)
    return op if right and isinstance(op, nn.RowWrite) else None
