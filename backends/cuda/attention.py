"""Attention of new positions over caches, with the writes of their keys and values.

See `pcc.backends.cuda.library`, which offers these, for the words used.
"""

from __future__ import annotations

from pcc.backends.cuda.instance import SMS, TYPES, Trait, instance, require
from pcc.backends.cuda.kernel import READ, SCRATCH, UPDATE, WRITE, Argument, Kernel

WARPS = 4
MOST_CHUNK = 32  # a lane for each position of a chunk
MOST_POSITIONS = 128  # of one pass: its new keys and values are held in shared memory


def attend(
    name: str,
    *,
    batch: int,
    count: int,
    heads: int,
    key_heads: int,
    width: int,
    rows: int,
    angles: int,
    positions: int,
    scale: float,
    dtype: str,
    window: int = 0,
    sms: int = SMS,
) -> Kernel:
    """Rotate q and k, write k and v into the caches at start.., attend: y [batch * count, H hd].

    Row b * count + i of `qkv` holds H query heads, Hk key heads, Hk value heads of `width` = hd
    each. Query i is at p = start[b] + i, and reads rows j <= p of the caches, j > p - window if
    `window` > 0. Rotation as `t.rotary` by tables of `angles` columns, 0: none (then the tables are
    no arguments). Arguments: `qkv f32[batch*count,(H+2Hk)hd]`, `cos f32[positions,angles]`, `sin`,
    `start i64[batch]`, `key dtype[batch,Hk,rows,hd]`, `value` (both updated in place),
    `y dtype[batch*count,H*hd]`, scratch `partial f32[..]`, `done u32[..]` (zero).
    hd is a multiple of 16, at most 128; count at most 128; otherwise E180.
    """
    require(key_heads > 0 and heads % key_heads == 0 and 0 <= 2 * angles <= width, name)
    require(width % 16 == 0 and 0 < width <= 128 and 0 < count <= MOST_POSITIONS, name)
    require(dtype in TYPES and dtype != "f32" and count <= rows, name)
    group = heads // key_heads
    tiles = -(-count * group // 16)
    pairs = batch * key_heads * tiles
    splits = _key_splits(pairs, rows if window == 0 else min(rows, window + count), sms)
    args = [Argument("qkv", READ, "f32", (batch * count, (heads + 2 * key_heads) * width))]
    args += _tables(positions, angles)
    args.append(Argument("start", READ, "i64", (batch,)))
    cache = (batch, key_heads, rows, width)
    args += [Argument(x, UPDATE, dtype, cache) for x in ("key", "value")]
    args.append(Argument("y", WRITE, dtype, (batch * count, heads * width)))
    args += _attend_scratch(pairs, splits, width)
    traits: dict[str, Trait] = {
        "T": TYPES[dtype], "B": batch, "N": count, "H": heads, "HK": key_heads, "D": width,
        "ROWS": rows, "R": angles, "P": positions, "WINDOW": window, "SCALE": scale,
        "SPLITS": splits, "TILES": tiles, "EVA": False, "CHUNK": 1, "OLDER": 0, "CHUNKS": 0,
    }  # fmt: skip
    grid = (splits + 1, tiles, batch * key_heads)
    shared = _attend_shared(count, 0, width)
    return instance(name, "attend", traits, args, grid, 32 * WARPS, shared, splits + 1)


def eva_attend(
    name: str,
    *,
    batch: int,
    count: int,
    heads: int,
    width: int,
    ring: int,
    older: int,
    angles: int,
    positions: int,
    scale: float,
    window: int,
    chunk: int,
    dtype: str,
    sms: int = SMS,
) -> Kernel:
    """EVA attention with its writes: rings, then summaries of the chunks touched, then y.

    `t.ring_write` of the rotated k and of v, `t.ring_chunks`, the pools of `pcc.models.evabyte`
    (with half = 1 / (2 sqrt hd)), `t.cache_write` into the summaries, `t.eva_attention`; values are
    rounded where they are stored. Arguments: `qkv f32[batch*count,3 H hd]`,
    `cos f32[positions,angles]`, `sin`, `start i64[batch]`, updated `key dtype[batch,H,ring,hd]`,
    `value`, `summary_key dtype[batch,H,older,hd]`, `summary_value`; `mu f32[H,hd]`, `phi f32[H,hd]`
    (times hd^(-1/2) already), `y dtype[batch*count,H*hd]`, scratch as in `attend`. Limits as
    there, and chunks of at most 32.
    """
    require(
        heads > 0 and 0 <= 2 * angles <= width and 0 < chunk <= MOST_CHUNK and window % chunk == 0,
        name,
    )
    require(width % 16 == 0 and 0 < width <= 128 and 0 < count <= MOST_POSITIONS, name)
    require(dtype in TYPES and dtype != "f32" and max(count, chunk) <= ring, name)
    chunks = (count + chunk - 2) // chunk + 1
    tiles = -(-count // 16)
    pairs = batch * heads * tiles
    splits = _key_splits(pairs, min(ring, window) + older // 2, sms)
    args = [Argument("qkv", READ, "f32", (batch * count, 3 * heads * width))]
    args += _tables(positions, angles)
    args.append(Argument("start", READ, "i64", (batch,)))
    for part, length in (("", ring), ("summary_", older)):
        cache = (batch, heads, length, width)
        args += [Argument(part + x, UPDATE, dtype, cache) for x in ("key", "value")]
    args += [Argument(x, READ, "f32", (heads, width)) for x in ("mu", "phi")]
    args.append(Argument("y", WRITE, dtype, (batch * count, heads * width)))
    args += _attend_scratch(pairs, splits, width)
    traits: dict[str, Trait] = {
        "T": TYPES[dtype], "B": batch, "N": count, "H": heads, "HK": heads, "D": width,
        "ROWS": ring, "R": angles, "P": positions, "WINDOW": window, "SCALE": scale,
        "SPLITS": splits, "TILES": tiles, "EVA": True, "CHUNK": chunk, "OLDER": older,
        "CHUNKS": chunks,
    }  # fmt: skip
    grid = (splits + 1, tiles, batch * heads)
    shared = _attend_shared(count, chunks, width, chunk)
    return instance(name, "attend", traits, args, grid, 32 * WARPS, shared, splits + 1)


def _tables(positions: int, angles: int) -> list[Argument]:
    shape = (positions, angles)
    return [Argument(x, READ, "f32", shape) for x in ("cos", "sin")] if angles else []


def _key_splits(pairs: int, rows: int, sms: int) -> int:
    """Return over how many blocks the old keys of a head go: with the new ones', a cluster."""
    most = 8 if pairs <= sms else 4 if pairs <= 2 * sms else 2
    return max(2, min(most, 1 << (rows // 64).bit_length())) - 1


def _attend_scratch(pairs: int, splits: int, width: int) -> list[Argument]:
    size = pairs * (splits + 1) * 16 * (width + 2)
    return [
        Argument("partial", SCRATCH, "f32", (size,)),
        Argument("done", SCRATCH, "u32", (pairs,), zero=True),
    ]


def _attend_shared(count: int, chunks: int, width: int, chunk: int = 0) -> int:
    """Return the bytes of shared memory: queries, then rings of keys or all the new ones."""
    new = 16 * sum(-(-x // 16) for x in (count, chunks, chunks * chunk))
    ring = WARPS * 2 * 16
    return 16 * width * 2 + max(new, ring) * width * 4 + WARPS * 16 * 8 + 2 * width * 4
