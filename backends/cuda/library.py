"""The hand-written kernels: for each a function from its sizes to a `Kernel`.

Sizes are constants of the source; `rows` is M = batch * positions. Buffers are dense and row-major;
"half" stands for the kernel's `dtype`, "f16" or "bf16". Sums are f32. `gpu`: for which the work is
divided. More in `docs/cuda.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pcc.backends.cuda.attention import MOST_CHUNK, MOST_POSITIONS, attend, eva_attend
from pcc.backends.cuda.gpu import TUNED, Gpu
from pcc.backends.cuda.instance import TYPES, Trait, instance, require
from pcc.backends.cuda.kernel import READ, SCRATCH, UPDATE, WRITE, Argument, Kernel
from pcc.backends.cuda.narrow import Narrow, narrow
from pcc.backends.cuda.pack import packed_size, strips_of
from pcc.backends.cuda.split import WARPS, Split, split

__all__ = [
    "MOST_CHUNK", "MOST_POSITIONS", "Argument", "Kernel", "attend", "embedding", "eva_attend",
    "linear", "rms_norm",
]  # fmt: skip

SOURCES = ("f32", "half", "norm")
EPILOGUES = ("none", "residual", "gated")
ACTIVATIONS = ("silu", "gelu")


def linear(
    name: str, *, rows: int, k: int, n: int, dtype: str, source: str = "f32", out: str = "f32",
    epilogue: str = "none", activation: str = "silu", bias: bool = False, squares: bool = False,
    eps: float = 0.0, integers: bool = False, gpu: Gpu = TUNED,
    slabs: int | None = None, warps: int | None = None, cluster: int | None = None,
) -> Kernel:  # fmt: skip
    """A product: z = round(x) W + b; y = z, y += z, or y_i = act(z_2i) z_2i+1 by `epilogue`.

    With `integers`, W = q s for 8-bit integers q and a scale s for each column: z = (round(x) q) s.

    Arguments in order:
    `x [rows,k]` f32, or half where `source` is "half"; where it is "norm", x f32 is normalised
    first, x * gain / sqrt(sum over strips of squares / k + eps), and these two follow:
    `gain f32[k]`, `squares f32[rows,strips(k)]`, the sums of x^2 over each 32 columns, as whoever
    made x wrote them (`squares=True` of `linear` and `embedding`);
    `w dtype[packed_size(k,n)]`, packed by `pack_linear` (and before by `interleave` where gated),
    with `integers` `w u8[packed_size(k,n,"u8")]` and `scales f32[n]` (interleaved where gated);
    `bias f32[n]` if asked (interleaved where gated);
    `y` f32, or half where `out` is "half", [rows,n], or [rows,n/2] where `epilogue` is "gated";
    it is updated in place where `epilogue` is "residual";
    `squares_out f32[rows,strips(n)]` if `squares` (only without "gated");
    `partial f32[..]` and `count u32[strips(n)]` (zero), scratch, where K is divided over blocks
    that share no memory: what `narrow` does not take.
    `slabs`, or `warps` and `cluster`: a division to be measured, instead of the one that is chosen
    (E180 where there is none such).
    dtype "f32": all values are f32, `source` is "f32" and nothing is rounded.
    """
    product = _Product(rows, k, n, dtype, source, out, epilogue, activation, bias, squares, eps,
                       integers)  # fmt: skip
    product.require(name)
    traits, args = product.traits(), product.arguments()
    if dtype == "f32":
        grid = (strips_of(n), -(-rows // 8), 1)
        return instance(gpu, name, "linear32", traits, args, grid, 256)
    few = None
    if slabs is None:
        few = narrow(rows, k, n, gpu, product.weights, source, warps, cluster)
    require(few is not None or (warps, cluster) == (None, None), name)
    if few is not None:
        return _narrow(name, few, traits, args)
    how = split(rows, k, n, gpu, slabs, product.weights)
    return _streamed(name, how, n, traits, args)


@dataclass(frozen=True)
class _Product:
    """The options of `linear` that say what is computed."""

    rows: int
    k: int
    n: int
    dtype: str
    source: str
    out: str
    epilogue: str
    activation: str
    bias: bool
    squares: bool
    eps: float
    integers: bool

    @property
    def weights(self) -> str:
        """The dtype of the packed W."""
        return "u8" if self.integers else self.dtype

    def require(self, name: str) -> None:
        """Refuse what no kernel is written for. Errors: E180."""
        gated, epilogue = self.epilogue == "gated", self.epilogue
        require(self.source in SOURCES and epilogue in EPILOGUES, name)
        require(self.activation in ACTIVATIONS and self.out in ("f32", "half"), name)
        require(self.dtype in TYPES and min(self.rows, self.k, self.n) > 0, name)
        require(not (gated and (self.n % 2 or self.squares)), name)
        require(not (epilogue == "residual" and self.out == "half"), name)
        require(self.dtype != "f32" or (self.source == "f32" and not self.integers), name)

    @property
    def kind(self) -> str:
        """The type of the result."""
        return self.dtype if self.out == "half" else "f32"

    def traits(self) -> dict[str, Trait]:
        """Return the constants of the source."""
        return {
            "T": TYPES[self.dtype], "Out": TYPES[self.kind], "M": self.rows, "K": self.k,
            "N": self.n, "SOURCE": SOURCES.index(self.source),
            "EPILOGUE": EPILOGUES.index(self.epilogue), "GELU": self.activation == "gelu",
            "BIAS": self.bias, "SQUARES": self.squares, "EPS": self.eps, "SCALED": self.integers,
        }  # fmt: skip

    def arguments(self) -> list[Argument]:
        """Return the arguments without scratch, in order."""
        rows, k, n = self.rows, self.k, self.n
        role = UPDATE if self.epilogue == "residual" else WRITE
        width = n // 2 if self.epilogue == "gated" else n
        packed = packed_size(k, n, self.weights)
        return [
            Argument("x", READ, self.dtype if self.source == "half" else "f32", (rows, k)),
            *(_norm(rows, k) if self.source == "norm" else ()),
            Argument("w", READ, self.weights, (packed,), early=self.dtype != "f32"),
            *([Argument("scales", READ, "f32", (n,))] if self.integers else ()),
            *([Argument("bias", READ, "f32", (n,))] if self.bias else ()),
            Argument("y", role, self.kind, (rows, width)),
            *(
                [Argument("squares_out", WRITE, "f32", (rows, strips_of(n)))]
                if self.squares
                else ()
            ),
        ]


def _norm(rows: int, k: int) -> tuple[Argument, Argument]:
    gain = Argument("gain", READ, "f32", (k,))
    return gain, Argument("squares", READ, "f32", (rows, strips_of(k)))


def _narrow(name: str, how: Narrow, traits: dict[str, Trait], args: list[Argument]) -> Kernel:
    """Return a product of few rows, all of x in registers, divided as `how` says."""
    traits |= {
        "TILES": how.tiles, "CLUSTER": how.cluster, "COLUMNS": how.columns,
        "WARPS": how.warps, "STAGES": how.stages,
    }  # fmt: skip
    args = [replace(a, early=True) if a.name == "gain" else a for a in args]
    grid = (how.columns * how.cluster, 1, 1)
    return instance(
        how.gpu, name, "narrow", traits, args, grid, 32 * how.warps, how.shared, how.cluster
    )


def _streamed(
    name: str, how: Split, n: int, traits: dict[str, Trait], args: list[Argument]
) -> Kernel:
    """Return a product through tensor cores, divided as `how` says."""
    if how.slabs > 1:
        size = strips_of(n) * how.slabs * how.parts * how.tiles * 8 * 32
        args.append(Argument("partial", SCRATCH, "f32", (size,)))
        args.append(Argument("count", SCRATCH, "u32", (strips_of(n) * how.parts,), zero=True))
    traits |= {
        "TILES": how.tiles, "SLABS": how.slabs, "COLUMNS": how.columns,
        "SLAB": how.slab_blocks, "PITCH": how.pitch, "WARPS": WARPS, "STAGES": how.stages,
    }  # fmt: skip
    grid = (how.columns, how.slabs, how.parts)
    return instance(how.gpu, name, "linear", traits, args, grid, 32 * WARPS, how.shared)


def rms_norm(
    name: str, *, rows: int, width: int, eps: float, dtype: str = "f32", wide: bool = False,
    gpu: Gpu = TUNED,
) -> Kernel:  # fmt: skip
    """RMS norm: y = gain * x / sqrt(mean(x^2) + eps) over rows of x.

    Arguments: `x f32[rows,width]`, `gain f32[width]`, `y dtype[rows,width]`, and where `wide` the
    same unrounded, `y32 f32[rows,width]`.
    """
    require(dtype in TYPES and rows > 0 and width > 0 and not (wide and dtype == "f32"), name)
    args = [
        Argument("x", READ, "f32", (rows, width)),
        Argument("gain", READ, "f32", (width,), early=True),
        Argument("y", WRITE, dtype, (rows, width)),
    ]
    if wide:
        args.append(Argument("y32", WRITE, "f32", (rows, width)))
    traits: dict[str, Trait] = {"T": TYPES[dtype], "D": width, "EPS": eps, "WIDE": wide}
    return instance(gpu, name, "rms_norm", traits, args, (rows, 1, 1), 512)


def embedding(
    name: str, *, rows: int, vocab: int, width: int, dtype: str, squares: bool = False,
    gpu: Gpu = TUNED,
) -> Kernel:  # fmt: skip
    """Look-up: y_m = table[ids_m] in f32; an id out of range takes the nearest row.

    Arguments: `ids i64[rows]`, `table dtype[vocab,width]` (not packed), `y f32[rows,width]`, and
    with `squares` `squares_out f32[rows,strips(width)]` as in `linear`.
    """
    require(dtype in TYPES and rows > 0 and vocab > 0 and width > 0, name)
    args = [
        Argument("ids", READ, "i64", (rows,)),
        Argument("table", READ, dtype, (vocab, width)),
        Argument("y", WRITE, "f32", (rows, width)),
    ]
    if squares:
        args.append(Argument("squares_out", WRITE, "f32", (rows, strips_of(width))))
    traits: dict[str, Trait] = {
        "T": TYPES[dtype],
        "M": rows,
        "V": vocab,
        "D": width,
        "SQUARES": squares,
    }
    grid = (-(-strips_of(width) // 8), rows, 1)
    return instance(gpu, name, "embedding", traits, args, grid, 256)
