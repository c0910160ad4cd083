"""Store the matrices that map a context to a head's parameters in half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pcc.ir.core import Op, Uses, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import split_equation
from pcc.passes.manager import Exact, Notes, Pass
from pcc.tensor import nn
from pcc.tensor import ops as t

NOT_FEATURES = ("x", "u")  # inputs that are values and uniforms, not features
KEEPS = (
    t.Add, t.Sub, t.Mul, t.Contract, t.ScaledContract, t.Reshape, t.Take, t.Transpose, t.Concat,
    nn.Silu, nn.Gelu, nn.Relu, nn.RmsNorm, nn.LayerNorm,
)  # fmt: skip
SAMPLE = 256  # rows of a matrix that validation multiplies


@dataclass(frozen=True)
class HalfProjections(Pass):
    """W x => round(W) round(x), for trained W and features x; `dtype` is f16 or bf16.

    Features are what is computed from inputs without a softmax, an exponential or a logarithm.
    Pays: these matrices are nearly all bytes that a draft reads. Declined for probabilities:
    trained tables of a circuit, and everything after the softmaxes, stay f32.
    Validation judges the products themselves (their scores, relative beyond 1), not what a draw
    makes of them.
    """

    name: ClassVar[str] = "half-projections"
    exact: ClassVar[Exact] = Exact.LOSSY
    tolerance: ClassVar[float] = 0.25  # bf16: 2^-8 of scores of up to some tens
    dtype: str = "f16"

    def run(self, module: Module, notes: Notes) -> Module:
        """Round every matrix that features meet."""
        sites = set(feature_products(module))

        def rule(n: Op, _: Uses) -> Op | None:
            if not isinstance(n, t.Contract) or (n.eq, _source(n.b)) not in sites:
                return None
            notes.did(n, f"{tensor(n.b)} as {self.dtype}")
            return t.Contract(n.a, _rounded(n.b, self.dtype), n.eq)

        return module.rewrite(rule)

    def sites(self, module: Module) -> Module:
        """Return the products that are changed, of large matrices some rows, as a module."""
        known = set(feature_products(module))
        found = [sampled(n) for n in module.nodes()
                 if isinstance(n, t.Contract) and (n.eq, _source(n.b)) in known]  # fmt: skip
        outputs = tuple((f"y{i}", n) for i, n in enumerate(found) if n is not None)
        return Module(module.name, module.cards, outputs)


def feature_products(module: Module) -> list[tuple[str, Op | None]]:
    """Return (equation, matrix) of each product of features with a trained f32 matrix.

    The matrix, not the rows that are selected from it: what selects them may be changed itself.
    """
    features: set[Op] = set()
    found: list[tuple[str, Op | None]] = []
    for n in module.nodes():
        if isinstance(n, t.Input):
            if n.dtype == "f32" and n.batch and n.key not in NOT_FEATURES:
                features.add(n)
        elif isinstance(n, KEEPS):
            inside = [a in features or isinstance(a, t.Const) for a in n.args]
            if all(inside) and any(a in features for a in n.args):
                features.add(n)
            if isinstance(n, t.Contract) and n.a in features and _matrix(n.b, n.eq):
                found.append((n.eq, _source(n.b)))
    return found


def _matrix(b: Op, eq: str) -> bool:
    """Whether `b` is a trained f32 matrix, or rows of one, and the equation sums over an axis."""
    (ta, tb), out = split_equation(eq)
    const = _source(b)
    summed = (set(ta) & set(tb)) - set(out)
    return const is not None and tensor(const).dtype == "f32" and bool(summed)


def _source(b: Op) -> t.Const | None:
    while isinstance(b, t.Reshape | t.SelectRow):
        b = b.x if isinstance(b, t.Reshape) else b.w
    return b if isinstance(b, t.Const) else None


def _rounded(b: Op, dtype: str) -> Op:
    if isinstance(b, t.Const):
        return t.Const(b.value.cast(dtype))
    if isinstance(b, t.Reshape) and not isinstance(b.x, t.Const):
        return t.Reshape(_rounded(b.x, dtype), b.shape)
    if isinstance(b, t.SelectRow):  # rows are widened as they are selected
        return t.SelectRow(_rounded(b.w, dtype), b.sel)
    return b


def sampled(n: t.Contract) -> Op | None:
    """Return a product with some rows of its matrix; None if it selects them at run time."""
    (ta, tb), out = split_equation(n.eq)
    if not isinstance(n.b, t.Const):
        return None
    if len(ta) != 1 or tb[-1] != ta or out != tb[:-1]:
        return n
    array = n.b.value
    rows = array.reshaped((array.size // array.shape[-1], array.shape[-1]))
    some = rows.taken(range(min(SAMPLE, rows.shape[0])))
    return t.Contract(n.a, t.Const(some), "d,kd->k")
