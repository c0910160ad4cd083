"""Attention of new positions over caches, with the writes of their keys and values.

See `pcc.backends.cuda.library`, which offers these, for the words used.
"""

from __future__ import annotations

from dataclasses import dataclass

from pcc.backends.cuda.gpu import KB, TUNED, Gpu
from pcc.backends.cuda.instance import TYPES, Trait, instance, require
from pcc.backends.cuda.kernel import READ, SCRATCH, UPDATE, WRITE, Argument, Kernel
from pcc.backends.cuda.narrow import room
from pcc.tensor.eva import chunk_count

WARPS = 4
STAGES = 2  # of a warp's ring of old keys, 16 in each
DEEPER = 3  # where a block has a multiprocessor to itself, and leaves room for a product's rings
MOST_CHUNK = 32  # a lane for each position of a chunk
MOST_POSITIONS = 128  # of one pass: its new keys and values are held in shared memory
STATIC = 1 * KB  # of shared memory at most that the kernel has without asking


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one pass. `rows`: of the caches; `reach`: old rows that a query reads at most.

    `chunks`: of `chunk` positions each, touched by the pass; `older`: rows of the summaries.
    """

    batch: int
    count: int
    heads: int
    key_heads: int
    width: int
    rows: int
    angles: int
    positions: int
    scale: float
    window: int
    dtype: str
    reach: int
    gpu: Gpu
    chunk: int = 1
    older: int = 0
    chunks: int = 0

    @property
    def tiles(self) -> int:
        """Tiles of 16 queries that share keys."""
        return -(-self.count * (self.heads // self.key_heads) // 16)

    @property
    def pairs(self) -> int:
        """Tiles over all heads of keys."""
        return self.batch * self.key_heads * self.tiles

    @property
    def parts(self) -> int:
        """Blocks of a head, a cluster: for old keys, for new ones, with EVA for new summaries."""
        sms, least = self.gpu.processors, 4 if self.chunks else 2
        most = 8 if self.pairs <= sms else 4 if self.pairs <= 2 * sms else 2
        return max(least, min(most, 1 << (self.reach // 64).bit_length()))

    @property
    def stages(self) -> int:
        """Blocks of 16 old keys in flight of a warp."""
        alone = self.pairs * self.parts <= self.gpu.processors
        beside = room(self.batch * self.count, self.gpu)
        fits = self.shared(DEEPER) + STATIC + beside <= self.gpu.block_shared
        return DEEPER if alone and fits else STAGES

    def shared(self, stages: int) -> int:
        """Bytes of dynamic shared memory."""
        return _attend_shared(self.count, self.chunks, self.width, self.chunk, stages)

    @property
    def splits(self) -> int:
        """Over how many blocks the old keys of a head go."""
        return self.parts - (2 if self.chunks else 1)


def attend(
    name: str, *, batch: int, count: int, heads: int, key_heads: int, width: int, rows: int,
    angles: int, positions: int, scale: float, dtype: str, window: int = 0, gpu: Gpu = TUNED,
) -> Kernel:  # fmt: skip
    """Rotate q and k, write k and v into the caches at start.., attend: y [batch * count, H hd].

    Row b * count + i of `qkv` holds H query heads, Hk key heads, Hk value heads of `width` = hd
    each. Query i is at p = start[b] + i, and reads rows j <= p of the caches, j > p - window if
    `window` > 0. Rotation as `t.rotary` by tables of `angles` columns, 0: none (then the tables are
    no arguments). Arguments: `qkv f32[batch*count,(H+2Hk)hd]`, `cos f32[positions,angles]`, `sin`,
    `start i64[batch]`, `key dtype[batch,Hk,rows,hd]`, `value` (both updated in place),
    `y dtype[batch*count,H*hd]`, scratch `partial f32[..]`, `done u32[..]` (zero).
    hd is a multiple of 16, at most 128; count at most 128, and as `fits` says; otherwise E180.
    """
    require(key_heads > 0 and heads % key_heads == 0 and count <= rows, name)
    _require(name, count, width, angles, dtype)
    reach = rows if window == 0 else min(rows, window + count)
    sizes = _Sizes(
        batch, count, heads, key_heads, width, rows, angles, positions, scale, window, dtype,
        reach, gpu,
    )  # fmt: skip
    return _kernel(name, sizes)


def eva_attend(
    name: str, *, batch: int, count: int, heads: int, width: int, ring: int, older: int,
    angles: int, positions: int, scale: float, window: int, chunk: int, dtype: str,
    gpu: Gpu = TUNED,
) -> Kernel:  # fmt: skip
    """EVA attention with its writes: rings, then summaries of the chunks touched, then y.

    `t.ring_write` of the rotated k and of v, `t.ring_chunks`, the pools of `pcc.models.evabyte`
    (with half = 1 / (2 sqrt hd)), `t.cache_write` into the summaries, `t.eva_attention`; values are
    rounded where they are stored. Arguments: `qkv f32[batch*count,3 H hd]`,
    `cos f32[positions,angles]`, `sin`, `start i64[batch]`, updated `key dtype[batch,H,ring,hd]`,
    `value`, `summary_key dtype[batch,H,older,hd]`, `summary_value`; `mu f32[H,hd]`, `phi f32[H,hd]`
    (times hd^(-1/2) already), `y dtype[batch*count,H*hd]`, scratch as in `attend`. Limits as
    there, and chunks of at most 32. Old rows in reach must not be those that the pass overwrites:
    ring >= window + count, or one that never wraps (`pcc.models.evabyte` sees to it).
    """
    require(heads > 0 and 0 < chunk <= MOST_CHUNK and window % chunk == 0, name)
    require(max(count, chunk) <= ring, name)
    _require(name, count, width, angles, dtype)
    chunks = chunk_count(count, chunk)
    sizes = _Sizes(
        batch, count, heads, heads, width, ring, angles, positions, scale, window, dtype,
        min(ring, window) + older // 2, gpu, chunk, older, chunks,
    )  # fmt: skip
    return _kernel(name, sizes)


def fits(gpu: Gpu, *, count: int, width: int, chunk: int = 0) -> bool:
    """Whether a block of a GPU holds the new keys and values of a pass, with EVA its chunks too."""
    chunks = chunk_count(count, chunk) if chunk else 0
    return _attend_shared(count, chunks, width, chunk) + STATIC <= gpu.block_shared


def _require(name: str, count: int, width: int, angles: int, dtype: str) -> None:
    """Refuse what neither kernel is written for. Errors: E180."""
    require(width % 16 == 0 and 0 < width <= 128 and 0 <= 2 * angles <= width, name)
    require(dtype in TYPES and dtype != "f32" and 0 < count <= MOST_POSITIONS, name)


def _kernel(name: str, s: _Sizes) -> Kernel:
    traits: dict[str, Trait] = {
        "T": TYPES[s.dtype], "B": s.batch, "N": s.count, "H": s.heads, "HK": s.key_heads,
        "D": s.width, "ROWS": s.rows, "R": s.angles, "P": s.positions, "WINDOW": s.window,
        "SCALE": s.scale, "SPLITS": s.splits, "TILES": s.tiles, "EVA": s.chunks > 0,
        "CHUNK": s.chunk, "OLDER": s.older, "CHUNKS": s.chunks, "STAGES": s.stages,
    }  # fmt: skip
    grid = (s.parts, s.tiles, s.batch * s.key_heads)
    shared = s.shared(s.stages)
    require(shared + STATIC <= s.gpu.block_shared, name)
    args = _arguments(s)
    return instance(s.gpu, name, "attend", traits, args, grid, 32 * WARPS, shared, s.parts)


def _arguments(s: _Sizes) -> list[Argument]:
    of_rows = s.batch * s.count
    args = [Argument("qkv", READ, "f32", (of_rows, (s.heads + 2 * s.key_heads) * s.width))]
    args += _tables(s.positions, s.angles)
    args.append(Argument("start", READ, "i64", (s.batch,), early=True))
    for part, length in (("", s.rows), ("summary_", s.older))[: 2 if s.chunks else 1]:
        cache = (s.batch, s.key_heads, length, s.width)
        args += [Argument(part + x, UPDATE, s.dtype, cache, early=True) for x in ("key", "value")]
    if s.chunks:
        args += [Argument(x, READ, "f32", (s.heads, s.width), early=True) for x in ("mu", "phi")]
    args.append(Argument("y", WRITE, s.dtype, (of_rows, s.heads * s.width)))
    return args + _attend_scratch(s.pairs, s.parts, s.width)


def _tables(positions: int, angles: int) -> list[Argument]:
    shape = (positions, angles)
    return [Argument(x, READ, "f32", shape) for x in ("cos", "sin")] if angles else []


def _attend_scratch(pairs: int, parts: int, width: int) -> list[Argument]:
    size = pairs * parts * 16 * (width + 2)
    return [
        Argument("partial", SCRATCH, "f32", (size,)),
        Argument("done", SCRATCH, "u32", (pairs,), zero=True),
    ]


def _attend_shared(count: int, chunks: int, width: int, chunk: int, stages: int = STAGES) -> int:
    """Return the bytes of shared memory: queries, then rings of keys or all the new ones."""
    new = 16 * sum(-(-x // 16) for x in (count, chunks, chunks * chunk))
    ring = WARPS * stages * 16
    return 16 * width * 2 + max(new, ring) * width * 4 + WARPS * 16 * 8 + 2 * width * 4
