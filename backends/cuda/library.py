"""The hand-written kernels: for each a function from its sizes to a `Kernel`.

Sizes are constants of the source; `rows` is M = batch * positions. Buffers are dense and row-major;
"half" stands for the kernel's `dtype`, "f16" or "bf16". Sums are f32. Equations: `docs/cuda.md`.
"""

from __future__ import annotations

from pcc.backends.cuda.kernel import READ, SCRATCH, UPDATE, WRITE, Argument, Kernel
from pcc.backends.cuda.pack import packed_size, strips_of
from pcc.backends.cuda.split import PIECE, STAGES, WARPS, split
from pcc.errors import PccError

__all__ = ["Argument", "Kernel", "attend", "embedding", "eva_attend", "linear", "rms_norm"]

TYPES = {"f16": "__half", "bf16": "__nv_bfloat16", "f32": "float"}
SMS = 132  # multiprocessors of an H100 SXM or H200: for how many the work is divided
SOURCES = ("f32", "half", "norm")
EPILOGUES = ("none", "residual", "gated")
ACTIVATIONS = ("silu", "gelu")
LOOK_AHEAD = 16 << 20  # bytes of the next product's weights: a third of the L2 of an H100
ATTEND_WARPS = 4
MOST_SPLITS = 32  # of the keys of a head: one thread adds up as many heads of a row
MOST_POSITIONS = 128  # of one pass: its new keys and values are held in shared memory


def linear(
    name: str,
    *,
    rows: int,
    k: int,
    n: int,
    dtype: str,
    source: str = "f32",
    out: str = "f32",
    epilogue: str = "none",
    activation: str = "silu",
    bias: bool = False,
    squares: bool = False,
    eps: float = 0.0,
    sms: int = SMS,
    ahead: tuple[int, int] | None = None,
    slabs: int | None = None,
) -> Kernel:
    """A product: z = round(x) W + b; y = z, y += z, or y_i = act(z_2i) z_2i+1 by `epilogue`.

    Arguments in order:
    `x [rows,k]` f32, or half where `source` is "half"; where it is "norm", x f32 is normalised
    first, x * gain / sqrt(sum over strips of squares / k + eps), and these two follow:
    `gain f32[k]`, `squares f32[rows,strips(k)]`, the sums of x^2 over each 32 columns, as whoever
    made x wrote them (`squares=True` of `linear` and `embedding`);
    `w dtype[packed_size(k,n)]`, packed by `pack_linear` (and before by `interleave` where gated);
    `bias f32[n]` if asked (interleaved where gated);
    `y` f32, or half where `out` is "half", [rows,n], or [rows,n/2] where `epilogue` is "gated";
    it is updated in place where `epilogue` is "residual";
    `squares_out f32[rows,strips(n)]` if `squares` (only without "gated");
    `partial f32[..]` and `count u32[strips(n)]` (zero), scratch, where K is divided.
    `ahead dtype[packed_size(*ahead)]` if `ahead` = (k,n) of the next product of as many rows: weights
    whose beginnings are fetched into L2 at the end, while this and smaller launches end.
    dtype "f32": all values are f32, `source` is "f32" and nothing is rounded.
    """
    _require(source in SOURCES and epilogue in EPILOGUES and activation in ACTIVATIONS, name)
    _require(dtype in TYPES and out in ("f32", "half") and rows > 0 and k > 0 and n > 0, name)
    _require(not (epilogue == "gated" and (n % 2 or squares)), name)
    _require(not (epilogue == "residual" and out == "half"), name)
    _require(dtype != "f32" or source == "f32", name)
    plain = dtype == "f32"
    how = split(rows, k, n, sms, slabs)
    args = [Argument("x", READ, dtype if source == "half" else "f32", (rows, k))]
    if source == "norm":
        args.append(Argument("gain", READ, "f32", (k,)))
        args.append(Argument("squares", READ, "f32", (rows, strips_of(k))))
    args.append(Argument("w", READ, dtype, (packed_size(k, n),)))
    if bias:
        args.append(Argument("bias", READ, "f32", (n,)))
    kind = dtype if out == "half" else "f32"
    role = UPDATE if epilogue == "residual" else WRITE
    args.append(Argument("y", role, kind, (rows, n // 2 if epilogue == "gated" else n)))
    if squares:
        args.append(Argument("squares_out", WRITE, "f32", (rows, strips_of(n))))
    if how.slabs > 1 and not plain:
        size = strips_of(n) * how.slabs * how.parts * how.tiles * 8 * 32
        args.append(Argument("partial", SCRATCH, "f32", (size,)))
        args.append(Argument("count", SCRATCH, "u32", (strips_of(n) * how.parts,), zero=True))
    traits = {
        "T": TYPES[dtype], "Out": TYPES[kind], "M": rows, "K": k, "N": n,
        "SOURCE": SOURCES.index(source), "EPILOGUE": EPILOGUES.index(epilogue),
        "GELU": activation == "gelu", "BIAS": bias, "SQUARES": squares, "EPS": _f32(eps),
    }  # fmt: skip
    if plain:
        grid = (strips_of(n), -(-rows // 8), 1)
        return _kernel(name, "linear32", traits, args, grid, 256, 0)
    next_split = split(rows, *ahead, sms) if ahead else how
    if ahead:
        args.append(Argument("ahead", READ, dtype, (packed_size(*ahead),)))
    first = min(next_split.columns * WARPS, strips_of(ahead[1])) if ahead else 0
    most = LOOK_AHEAD // (max(1, first) * next_split.slabs * PIECE)
    traits |= {
        "AHEAD": min(most, next_split.blocks // next_split.slabs) if ahead else 0,
        "NEXT_STRIPS": first, "NEXT_SLABS": next_split.slabs, "NEXT_BLOCKS": next_split.blocks,
        "TILES": how.tiles, "SLABS": how.slabs, "COLUMNS": how.columns,
        "SLAB": how.slab_blocks, "PITCH": how.pitch, "WARPS": WARPS, "STAGES": STAGES,
    }  # fmt: skip
    return _kernel(
        name, "linear", traits, args, (how.columns, how.slabs, how.parts), 32 * WARPS, how.shared
    )


def rms_norm(
    name: str, *, rows: int, width: int, eps: float, dtype: str = "f32", wide: bool = False
) -> Kernel:
    """RMS norm: y = gain * x / sqrt(mean(x^2) + eps) over rows of x.

    Arguments: `x f32[rows,width]`, `gain f32[width]`, `y dtype[rows,width]`, and where `wide` the
    same unrounded, `y32 f32[rows,width]`.
    """
    _require(dtype in TYPES and rows > 0 and width > 0 and not (wide and dtype == "f32"), name)
    args = [
        Argument("x", READ, "f32", (rows, width)),
        Argument("gain", READ, "f32", (width,)),
        Argument("y", WRITE, dtype, (rows, width)),
    ]
    if wide:
        args.append(Argument("y32", WRITE, "f32", (rows, width)))
    traits = {"T": TYPES[dtype], "D": width, "EPS": _f32(eps), "WIDE": wide}
    return _kernel(name, "rms_norm", traits, args, (rows, 1, 1), 512, 0)


def embedding(
    name: str, *, rows: int, vocab: int, width: int, dtype: str, squares: bool = False
) -> Kernel:
    """Look-up: y_m = table[ids_m] in f32; an id out of range takes the nearest row.

    Arguments: `ids i64[rows]`, `table dtype[vocab,width]` (not packed), `y f32[rows,width]`, and
    with `squares` `squares_out f32[rows,strips(width)]` as in `linear`.
    """
    _require(dtype in TYPES and rows > 0 and vocab > 0 and width > 0, name)
    args = [
        Argument("ids", READ, "i64", (rows,)),
        Argument("table", READ, dtype, (vocab, width)),
        Argument("y", WRITE, "f32", (rows, width)),
    ]
    if squares:
        args.append(Argument("squares_out", WRITE, "f32", (rows, strips_of(width))))
    traits = {"T": TYPES[dtype], "M": rows, "V": vocab, "D": width, "SQUARES": squares}
    grid = (-(-strips_of(width) // 8), rows, 1)
    return _kernel(name, "embedding", traits, args, grid, 256, 0)


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
    _require(key_heads > 0 and heads % key_heads == 0 and 0 <= 2 * angles <= width, name)
    _require(width % 16 == 0 and 0 < width <= 128 and 0 < count <= MOST_POSITIONS, name)
    _require(dtype in TYPES and dtype != "f32" and count <= rows, name)
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
    traits = {
        "T": TYPES[dtype], "B": batch, "N": count, "H": heads, "HK": key_heads, "D": width,
        "ROWS": rows, "R": angles, "P": positions, "WINDOW": window, "SCALE": _f32(scale),
        "SPLITS": splits, "TILES": tiles, "EVA": False, "CHUNK": 1, "OLDER": 0, "CHUNKS": 0,
    }  # fmt: skip
    grid = (splits + 1, tiles, batch * key_heads)
    shared = _attend_shared(count, 0, width)
    return _kernel(name, "attend", traits, args, grid, 32 * ATTEND_WARPS, shared)


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
    (times hd^(-1/2) already), `y dtype[batch*count,H*hd]`, scratch as in `attend`. Limits as there, and
    chunks of at most 32.
    """
    _require(
        heads > 0 and 0 <= 2 * angles <= width and 0 < chunk <= 32 and window % chunk == 0, name
    )
    _require(width % 16 == 0 and 0 < width <= 128 and 0 < count <= MOST_POSITIONS, name)
    _require(dtype in TYPES and dtype != "f32" and max(count, chunk) <= ring, name)
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
    traits = {
        "T": TYPES[dtype], "B": batch, "N": count, "H": heads, "HK": heads, "D": width,
        "ROWS": ring, "R": angles, "P": positions, "WINDOW": window, "SCALE": _f32(scale),
        "SPLITS": splits, "TILES": tiles, "EVA": True, "CHUNK": chunk, "OLDER": older,
        "CHUNKS": chunks,
    }  # fmt: skip
    grid = (splits + 1, tiles, batch * heads)
    shared = _attend_shared(count, chunks, width, chunk)
    return _kernel(name, "attend", traits, args, grid, 32 * ATTEND_WARPS, shared)


def _tables(positions: int, angles: int) -> list[Argument]:
    shape = (positions, angles)
    return [Argument(x, READ, "f32", shape) for x in ("cos", "sin")] if angles else []


def _key_splits(pairs: int, rows: int, sms: int) -> int:
    """Return over how many blocks the keys of a head go: two waves, or 64 keys in each."""
    return max(1, min(2 * sms // pairs, -(-rows // 64), MOST_SPLITS))


def _attend_scratch(pairs: int, splits: int, width: int) -> list[Argument]:
    size = pairs * (splits + 1) * 16 * (width + 2)
    return [
        Argument("partial", SCRATCH, "f32", (size,)),
        Argument("done", SCRATCH, "u32", (pairs,), zero=True),
    ]


def _attend_shared(count: int, chunks: int, width: int, chunk: int = 0) -> int:
    """Return the bytes of shared memory: queries, then rings of keys or all the new ones."""
    new = 16 * sum(-(-x // 16) for x in (count, chunks, chunks * chunk))
    ring = ATTEND_WARPS * 2 * 16
    return 16 * width * 2 + max(new, ring) * width * 4 + ATTEND_WARPS * 16 * 8


def _kernel(
    name: str,
    template: str,
    traits: dict[str, object],
    args: list[Argument],
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
) -> Kernel:
    """Return the instance: its traits as constants of a struct, its pointers as a struct."""
    fields = "\n".join(f"  {_constant(k, v)}" for k, v in traits.items())
    pointers = ", ".join(f"{_pointer(a)} {a.name}" for a in args)
    given = "\n".join(f"  a.{a.name} = {a.name};" for a in args)
    source = (
        f'#include "{template}.cuh"\n'
        f"struct {name}_traits {{\n{fields}\n}};\n"
        f'extern "C" __global__ void __launch_bounds__({threads}, 1) {name}({pointers}) {{\n'
        f"  pcc::{template}_args<{name}_traits> a{{}};\n{given}\n"
        f"  pcc::{template}<{name}_traits>(a);\n}}\n"
    )
    return Kernel(name, source, grid, (threads, 1, 1), shared, False, tuple(args), overlap=True)


def _constant(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"static constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"static constexpr int {name} = {value};"
    text = str(value)
    if text.endswith("f") and text[0].isdigit():
        return f"static constexpr float {name} = {text};"
    return f"using {name} = {text};"


def _pointer(a: Argument) -> str:
    # Not __restrict__: loads declared free of conflicts may be moved before the wait for the
    # launches that write what they read.
    kinds = {"f32": "float", "i64": "long long", "u32": "unsigned", **TYPES}
    return f"{'const ' if a.role == READ else ''}{kinds[a.dtype]}*"


def _f32(value: float) -> str:
    return f"{value:.9g}f" if "." in f"{value:.9g}" or "e" in f"{value:.9g}" else f"{value:.9g}.0f"


def _require(ok: bool, name: str) -> None:
    if not ok:
        hint = "see the function of pcc.backends.cuda.library for what it takes"
        raise PccError("E180", f"no such kernel for {name!r}: sizes or options", hint=hint)
