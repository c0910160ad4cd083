"""Emitters of jobs on sequences: running sums, ranks, trajectories, caches and attention."""

from __future__ import annotations

from collections.abc import Callable

from pcc.backends.cuda.codegen.body import BRANCH, LOOP, Ix
from pcc.backends.cuda.codegen.program import literal
from pcc.backends.cuda.codegen.rows import number
from pcc.backends.cuda.codegen.tables import emits
from pcc.backends.cuda.codegen.work import LANES, Work
from pcc.ir.core import Op, tensor
from pcc.ir.types import HALVES
from pcc.tensor import eva, nn
from pcc.tensor import ops as t

AHEAD = 16  # maps whose rows a warp loads before it follows them
SHORT = 8  # of a running sum that one thread computes: its reads wait for each other


@emits("job", t.Cumsum)
def _(w: Work, n: t.Cumsum) -> None:
    if w.lanes:
        shape = w.program.shape(n)
        with w.over(shape[:-1]) as ix:
            r = w.registers(shape[-1], lambda j: w.read(n.x, (*ix, j)), ctype=number(n))
            w.body.emit(f"row_scan{'_before' if n.exclusive else ''}({r}, lane);")
            w.put_row(n, ix, r)
        return
    _line(w, n, n.axis, "0", "+", exclusive=n.exclusive)


@emits("job", t.CumProd)
def _(w: Work, n: t.CumProd) -> None:
    _line(w, n, n.axis, "1", "*", exclusive=True)


def _line(w: Work, n: Op, axis: int, first: str, sign: str, *, exclusive: bool) -> None:
    """Run along an axis, one thread for each line."""
    shape = list(w.program.shape(n))
    k = axis + (1 if tensor(n).batch else 0)
    length, shape[k] = shape[k], 1
    with w.over(tuple(shape)) as ix:
        b = w.body
        so_far = b.declare(number(n), first)
        i, head = b.loop(length)
        with b.block(LOOP, head, (i,)):
            at = (*ix[:k], i, *ix[k + 1 :])
            x = w.read(n.args[0], at)
            if exclusive:
                w.put(n, at, so_far)
            b.emit(f"{so_far} = {so_far} {sign} {x};")
            if not exclusive:
                w.put(n, at, so_far)
    w.cost += length


@emits("job", nn.SortRank)
def _(w: Work, n: nn.SortRank) -> None:
    size = tensor(n).shape[-1]
    with w.over(w.program.shape(n)) as ix:
        own, j = w.read(n.x, ix), ix[-1]

        def step(so_far: str, at: list[Ix]) -> str:
            x = w.read(n.x, (*ix[:-1], at[0]))
            return f"{so_far} + ({x} > {own} || ({x} == {own} && {at[0]} < {j}))"

        w.put(n, ix, w.fold("long long", "0", [size], step))


# ---------------------------------------------------------------- trajectories


@emits("job", t.Trajectory)
def _(w: Work, n: t.Trajectory) -> None:
    """One warp holds the rows of some maps: following them takes a shuffle each, and no load."""
    count, k = tensor(n.maps).shape
    held = -(-k // LANES)
    ahead = max(1, min(AHEAD, count, 2 * LANES // held))
    with w.over(w.program.shape(n)[:-1]) as lead:
        b = w.body
        start = w.read(n.start, (*w.lead(n.start, lead), 0))
        state = b.declare("int", f"clamp_index({start}, {k - 1})")
        i, maps = b.name("i"), b.name("r")
        with b.block(LOOP, f"for (int {i} = 0; {i} < {count}; {i} += {ahead}) {{", (i,)):
            b.emit(f"int {maps}[{ahead * held}];")
            mine = b.declare("int", "0")
            _loaded(w, n, lead, maps, i)
            s, q = b.name("i"), b.name("k")
            head = f"PCC_UNROLL for (int {s} = 0; {s} < {ahead}; ++{s}) if ({i} + {s} < {count}) {{"
            with b.block(LOOP, head, (s,)):
                after = b.declare("int", "0")
                with b.block(LOOP, f"PCC_UNROLL for (int {q} = 0; {q} < {held}; ++{q}) {{", (q,)):
                    x = f"__shfl_sync(ALL, {maps}[{s} * {held} + {q}], {state} % {LANES})"
                    b.emit(f"const int x = {x};")
                    b.emit(f"if ({state} / {LANES} == {q}) {after} = x;")
                b.emit(f"{state} = {after};")
                b.emit(f"if (lane == {s}) {mine} = {state};")
            with b.block(BRANCH, f"if (lane < {ahead} && {i} + lane < {count}) {{"):
                w.put(n, (*lead, b.let("int", f"{i} + lane")), mine)
    w.cost += count * (held + 1)


def _loaded(w: Work, n: t.Trajectory, lead: tuple[Ix, ...], maps: str, first: str) -> None:
    """Load the rows of maps `first`, `first` + 1, .. into registers."""
    count, k = tensor(n.maps).shape
    held = -(-k // LANES)
    ahead = max(1, min(AHEAD, count, 2 * LANES // held))
    b, s, q = w.body, w.body.name("i"), w.body.name("k")
    with b.block(LOOP, f"PCC_UNROLL for (int {s} = 0; {s} < {ahead}; ++{s}) {{", (s,)):
        with b.block(LOOP, f"PCC_UNROLL for (int {q} = 0; {q} < {held}; ++{q}) {{", (q,)):
            step, j = b.let("int", f"{first} + {s}"), b.let("int", f"lane + {LANES} * {q}")
            b.emit(f"{maps}[{s} * {held} + {q}] = 0;")
            with b.block(BRANCH, f"if ({step} < {count} && {j} < {k}) {{"):
                value = w.read(n.maps, (*w.lead(n.maps, lead), step, j))
                b.emit(f"{maps}[{s} * {held} + {q}] = clamp_index({value}, {k - 1});")


# ---------------------------------------------------------------- caches


@emits("job", nn.CacheWrite, eva.RingWrite)
def _(w: Work, n: nn.RowWrite) -> None:
    rows, count = tensor(n.cache).shape[1], tensor(n.update).shape[1]
    ring = isinstance(n, eva.RingWrite)
    if n in w.program.in_place:
        _rows_only(w, n, rows, count, ring=ring)
        return
    with w.over(w.program.shape(n)) as ix:
        lead, (h, s, d) = w.parts(n, ix)
        start = w.read(n.start, w.lead(n.start, lead))
        b = w.body
        text = f"{s} - {start}" if not ring else f"(({s} - {start}) % {rows} + {rows}) % {rows}"
        i = b.let("int", f"(int)({text})")
        # The last of several rows that fall together is what a ring keeps; count <= rows.
        value = b.either(
            "float",
            [
                (
                    f"{i} >= 0 && {i} < {count}",
                    lambda: w.read(n.update, (*w.lead(n.update, lead), h, i, d)),
                ),
                ("", lambda: w.read(n.cache, (*w.lead(n.cache, lead), h, s, d))),
            ],
        )
        w.put(n, ix, value)


def _rows_only(w: Work, n: nn.RowWrite, rows: int, count: int, *, ring: bool) -> None:
    """Write into the cache itself: only the rows that change."""
    heads, _, width = tensor(n.update).shape
    lead_shape = (w.program.batch,) if tensor(n).batch else ()
    with w.over((*lead_shape, heads, count, width)) as ix:
        lead, (h, i, d) = w.parts(n, ix)
        start = w.read(n.start, w.lead(n.start, lead))
        where = f"({start} + {i}) % {rows}" if ring else f"{start} + {i}"
        at = w.body.let("int", f"clamp_index({where}, {rows - 1})")
        w.put(n, (*lead, h, at, d), w.read(n.update, (*w.lead(n.update, lead), h, i, d)))


# ---------------------------------------------------------------- attention


class Softmax:
    """A weighted mean of values while the weights' logarithms come along, one query to a warp."""

    def __init__(self, w: Work, width: int) -> None:
        self.w, self.width, self.count = w, width, -(-width // LANES)
        b = w.body
        self.top, self.sum = b.declare("float", "-INFINITY"), b.declare("float", "0.0f")
        self.mean = b.name("r")
        b.level[self.mean] = len(b.stack) - 1
        b.emit(f"float {self.mean}[{self.count}] = {{}};")

    def take(self, last: str, score: Callable[[str], str], value: Callable[[str, Ix], str]) -> None:
        """Add the keys 0 .. last: score(key) and value(key, column)."""
        b, base, key = self.w.body, self.w.body.name("i"), self.w.body.name("i")
        with b.block(
            LOOP, f"for (int {base} = 0; {base} <= {last}; {base} += {LANES}) {{", (base,)
        ):
            b.emit(f"const int {key} = {base} + lane;")
            b.level[key] = len(b.stack) - 1
            mine = b.declare("float", "-INFINITY")
            with b.block(BRANCH, f"if ({key} <= {last}) {{"):
                b.emit(f"{mine} = {score(key)};")
            self._weigh(mine, last, base, value)

    def _weigh(self, mine: str, last: str, base: str, value: Callable[[str, Ix], str]) -> None:
        b, old, top = self.w.body, self.w.body.name("x"), self.w.body.name("x")
        b.emit(f"const float {top} = fmaxf({self.top}, warp_all<Largest>({mine}));")
        b.emit(f"const float {old} = expf({self.top} - {top});")
        b.emit(f"{self.top} = {top};")
        b.emit(f"{mine} = expf({mine} - {top});")
        b.emit(f"{self.sum} = {self.sum} * {old} + warp_all<Sum>({mine});")
        k, head = b.loop(self.count)
        with b.block(LOOP, head, (k,)):
            b.emit(f"{self.mean}[{k}] *= {old};")
        i, share = b.name("i"), b.name("x")
        head = f"for (int {i} = 0; {i} < {LANES} && {base} + {i} <= {last}; ++{i}) {{"
        with b.block(LOOP, head, (i,)):
            b.emit(f"const float {share} = __shfl_sync(ALL, {mine}, {i});")
            row = b.name("i")
            b.emit(f"const int {row} = {base} + {i};")
            b.level[row] = len(b.stack) - 1
            j, k = b.name("j"), b.name("k")
            with self.w.over_lanes(j, k, self.width):
                b.emit(f"{self.mean}[{k}] += {share} * {value(row, j)};")

    def put(self, n: Op, ix: tuple[Ix, ...]) -> None:
        """Store the mean as row `ix` of `n`."""
        j, k = self.w.body.name("j"), self.w.body.name("k")
        with self.w.over_lanes(j, k, self.width):
            self.w.put(n, (*ix, j), f"{self.mean}[{k}] / {self.sum}")


def _score(
    w: Work, n: Op, q: tuple[Op, tuple[Ix, ...]], k: tuple[Op, tuple[Ix, ...]], scale: float
) -> str:
    """Return scale * q . k, q rounded to what keys are stored in."""
    half = tensor(k[0]).dtype

    def step(so_far: str, at: list[Ix]) -> str:
        x, y = w.read(q[0], (*q[1], at[0])), w.read(k[0], (*k[1], at[0]))
        return f"{so_far} + {f'round_{half}({x})' if half in HALVES else x} * {y}"

    return f"{literal(scale)} * {w.fold('float', '0.0f', [tensor(q[0]).shape[2]], step)}"


@emits("job", nn.CachedAttention)
def _(w: Work, n: nn.CachedAttention) -> None:
    rows = tensor(n.k).shape[1]
    group = tensor(n.q).shape[0] // tensor(n.k).shape[0]
    with w.over(w.program.shape(n)[:-1]) as ix:
        lead, (h, i) = w.parts(n, ix)
        b, start = w.body, w.read(n.start, w.lead(n.start, lead))
        last = b.let("int", f"clamp_index({start} + {i}, {rows - 1})")
        first = (
            b.let("int", f"{last} >= {n.window} ? {last} - {n.window - 1} : 0") if n.window else "0"
        )
        head = h // group if isinstance(h, int) else b.let("int", f"{h} / {group}")
        mean = Softmax(w, tensor(n).shape[2])

        def at(key: str) -> Ix:
            return b.let("int", f"{first} + {key}") if n.window else key

        mean.take(
            b.let("int", f"{last} - {first}"),
            lambda key: _score(
                w,
                n,
                (n.q, (*w.lead(n.q, lead), h, i)),
                (n.k, (*w.lead(n.k, lead), head, at(key))),
                n.scale,
            ),
            lambda key, j: w.read(n.v, (*w.lead(n.v, lead), head, at(key), j)),
        )
        mean.put(n, ix)
    w.cost += rows * tensor(n.q).shape[2]


@emits("job", eva.EvaAttention)
def _(w: Work, n: eva.EvaAttention) -> None:
    rows, older = tensor(n.k).shape[1], tensor(n.sk).shape[1]
    with w.over(w.program.shape(n)[:-1]) as ix:
        lead, (h, i) = w.parts(n, ix)
        b, start = w.body, w.read(n.start, w.lead(n.start, lead))
        p = b.let("long long", f"{start} + {i}")
        begin = b.let("long long", f"{p} / {n.window} * {n.window}")
        past = b.let("int", f"clamp_index({begin} / {n.chunk}, {older})")
        mean = Softmax(w, tensor(n).shape[2])
        q = (n.q, (*w.lead(n.q, lead), h, i))

        def slot(key: str) -> Ix:
            return b.let("int", f"(int)(({begin} + {key}) % {rows})") if rows > 1 else 0

        def at(x: Op, row: Ix) -> tuple[Ix, ...]:
            return (*w.lead(x, lead), h, row)

        mean.take(
            b.let("int", f"(int)({p} - {begin})"),
            lambda key: _score(w, n, q, (n.k, at(n.k, slot(key))), n.scale),
            lambda key, j: w.read(n.v, (*at(n.v, slot(key)), j)),
        )
        mean.take(
            b.let("int", f"{past} - 1"),
            lambda key: _score(w, n, q, (n.sk, at(n.sk, key)), n.scale),
            lambda key, j: w.read(n.sv, (*at(n.sv, key), j)),
        )
        mean.put(n, ix)
    w.cost += (n.window + older) * tensor(n.q).shape[2]
