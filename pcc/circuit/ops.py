"""Circuit ops: functions of random variables. One class per op: operands, type, meaning, cost.

A circuit value has type `units<FxK>[scopes]`: K functions in each of F folds, fold f over the
variables `scopes[f]`. Weights and tables are tensor values `[F, ...]`, linear (not logarithms),
with a batch axis if they depend on the context.
"""

from __future__ import annotations

import numpy as np

from pcc.ir.core import Op, Values, tensor, units
from pcc.ir.semiring import Semiring
from pcc.ir.types import Type, Units, mask_of, show_scope


class CircuitOp(Op):
    """A value of type units."""

    def eval(self, s: Semiring, *args: Values) -> Values:
        """Return the units of this node from those of its operands, in the carrier `s`."""
        raise NotImplementedError(self.name)

    def madds(self) -> int:
        """Multiply-adds per row, the cost that passes compare."""
        return 0


class InputOp(CircuitOp):
    """Functions of one variable per fold, over the variables `vars`."""

    vars: tuple[int, ...]

    def scopes(self) -> tuple[int, ...]:
        """One single-variable scope per fold."""
        self.require(all(v >= 0 for v in self.vars), "E106", "a variable index is negative")
        return tuple(mask_of([v]) for v in self.vars)


class Categorical(InputOp, name="c.categorical"):
    """y[f,k] = p[f,k,x_v] for v = vars[f]: a non-negative table `p [F,K,V]`, linear.

    Rows that sum to one make it a distribution; that is a fact to be analysed, not a rule.
    """

    p: Op

    def infer(self) -> Type:
        t = tensor(self.p)
        self.require(
            t.dtype == "f32" and len(t.shape) == 3 and t.shape[0] == len(self.vars) > 0,
            "E102",
            f"the table is {t}, expected f32[{len(self.vars)},K,V]",
        )
        return Units(t.shape[1], self.scopes())


class Gaussian(InputOp, name="c.gaussian"):
    """y[f,k] = N(x_v; mu[f,k], sigma[f,k]) for v = vars[f]; sigma > 0 is a standard deviation."""

    mu: Op
    sigma: Op

    def infer(self) -> Type:
        t, u = tensor(self.mu), tensor(self.sigma)
        self.require(
            t.shape == u.shape and len(t.shape) == 2 and t.shape[0] == len(self.vars) > 0,
            "E102",
            f"parameters are {t} and {u}, expected f32[{len(self.vars)},K] twice",
        )
        return Units(t.shape[1], self.scopes())


def _weight(op: Op, w: Op, folds: int, *ins: int) -> int:
    """Check that `w` is [folds, out, *ins] and return `out`."""
    shape = tensor(w).shape
    op.require(
        len(shape) == len(ins) + 2 and (shape[0], *shape[2:]) == (folds, *ins),
        "E102",
        f"the weight is {w.type}, expected f32[{folds},Ko,{','.join(map(str, ins))}]",
    )
    return shape[1]


def _disjoint(op: Op, xs: tuple[Op, ...]) -> tuple[int, ...]:
    """Return the union scopes of a product's operands, which must not overlap."""
    op.require(len(xs) > 0, "E103", "a layer needs at least one operand")
    acc = list(units(xs[0]).scopes)
    for x in xs[1:]:
        other = units(x).scopes
        op.require(
            len(other) == len(acc),
            "E107",
            f"operands have {len(acc)} and {len(other)} folds",
            "gather the folds that are to be combined",
        )
        for f, (s, t) in enumerate(zip(acc, other, strict=True)):
            if s & t:
                op.require(
                    False,
                    "E201",
                    f"fold {f} is not decomposable: operands share variables {show_scope(s & t)}",
                    "a product layer may only multiply functions of disjoint variables",
                )
            acc[f] = s | t
    return tuple(acc)


def _same_k(op: Op, xs: tuple[Op, ...]) -> int:
    ks = {units(x).k for x in xs}
    op.require(len(ks) == 1, "E108", f"operands have different unit counts {sorted(ks)}")
    return ks.pop()


class Sum(CircuitOp, name="c.sum"):
    """Weighted sums of one layer: y[f,o] = sum_i w[f,o,i] x[f,i]; w `[F,Ko,Ki]`."""

    x: Op
    w: Op

    def infer(self) -> Type:
        x = units(self.x)
        return Units(_weight(self, self.w, x.folds, x.k), x.scopes)

    def eval(self, s: Semiring, *args: Values) -> Values:
        x, w = args
        return s.contract("foi,fi->fo", w, x)

    def madds(self) -> int:
        return int(units(self).folds * units(self).k * units(self.x).k)


class Mix(CircuitOp, name="c.mix"):
    """Unit-wise weighted sum of H layers: y[f,k] = sum_h w[f,k,h] x_h[f,k]; w `[F,K,H]`."""

    xs: tuple[Op, ...]
    w: Op

    def infer(self) -> Type:
        self.require(len(self.xs) > 0, "E103", "a layer needs at least one operand")
        k, first = _same_k(self, self.xs), units(self.xs[0])
        for x in self.xs[1:]:
            t = units(x)
            self.require(t.folds == first.folds, "E107", f"operands are {first} and {t}")
            for f, (a, b) in enumerate(zip(first.scopes, t.scopes, strict=True)):
                self.require(
                    a == b,
                    "E202",
                    f"fold {f} is not smooth: operands are over {show_scope(a)}, {show_scope(b)}",
                    "multiply the smaller operand by input units over the missing variables",
                )
        shape = tensor(self.w).shape
        want = (first.folds, k, len(self.xs))
        self.require(shape == want, "E102", f"the weight is {self.w.type}, expected f32{want}")
        return first

    def eval(self, s: Semiring, *args: Values) -> Values:
        *xs, w = args
        stacked = np.stack(np.broadcast_arrays(*xs), axis=-1)
        return s.contract("fkh,fkh->fk", w, stacked)

    def madds(self) -> int:
        return units(self).folds * units(self).k * len(self.xs)


class Hadamard(CircuitOp, name="c.hadamard"):
    """Unit-wise product: y[f,k] = prod_a x_a[f,k]."""

    xs: tuple[Op, ...]

    def infer(self) -> Type:
        scopes = _disjoint(self, self.xs)
        return Units(_same_k(self, self.xs), scopes)

    def eval(self, s: Semiring, *args: Values) -> Values:
        y = args[0]
        for x in args[1:]:
            y = s.product(y, x)
        return y

    def madds(self) -> int:
        return units(self).folds * units(self).k * (len(self.xs) - 1)


class Kronecker(CircuitOp, name="c.kronecker"):
    """All pairwise products: y[f, i*Kb + j] = a[f,i] b[f,j]."""

    a: Op
    b: Op

    def infer(self) -> Type:
        scopes = _disjoint(self, (self.a, self.b))
        return Units(units(self.a).k * units(self.b).k, scopes)

    def eval(self, s: Semiring, *args: Values) -> Values:
        y = s.contract("fi,fj->fij", None, *args)
        return y.reshape(*y.shape[:-2], -1)

    def madds(self) -> int:
        return units(self).folds * units(self).k


class Tucker(CircuitOp, name="c.tucker"):
    """`c.sum` of a `c.kronecker`, never materialised: y[f,o] = sum_ij w[f,o,i,j] a[f,i] b[f,j]."""

    a: Op
    b: Op
    w: Op

    def infer(self) -> Type:
        scopes, a, b = _disjoint(self, (self.a, self.b)), units(self.a), units(self.b)
        return Units(_weight(self, self.w, a.folds, a.k, b.k), scopes)

    def eval(self, s: Semiring, *args: Values) -> Values:
        a, b, w = args
        return s.contract("foij,fi,fj->fo", w, a, b)

    def madds(self) -> int:
        t = units(self)
        return t.folds * t.k * units(self.a).k * units(self.b).k


class Cpt(CircuitOp, name="c.cpt"):
    """`c.sum` of a `c.hadamard`: y[f,o] = sum_i w[f,o,i] prod_a x_a[f,i]; w `[F,Ko,Ki]`."""

    xs: tuple[Op, ...]
    w: Op

    def infer(self) -> Type:
        scopes, k = _disjoint(self, self.xs), _same_k(self, self.xs)
        return Units(_weight(self, self.w, len(scopes), k), scopes)

    def eval(self, s: Semiring, *args: Values) -> Values:
        *xs, w = args
        y = xs[0]
        for x in xs[1:]:
            y = s.product(y, x)
        return s.contract("foi,fi->fo", w, y)

    def madds(self) -> int:
        t, k = units(self), units(self.xs[0]).k
        return t.folds * k * (t.k + len(self.xs) - 1)


class Cp(CircuitOp, name="c.cp"):
    """`c.hadamard` of `c.sum`s: y[f,o] = prod_a sum_i w_a[f,o,i] x_a[f,i]; w_a `[F,Ko,Ka]`."""

    xs: tuple[Op, ...]
    ws: tuple[Op, ...]

    def infer(self) -> Type:
        scopes = _disjoint(self, self.xs)
        self.require(len(self.xs) == len(self.ws), "E103", "one weight per operand")
        ks = {
            _weight(self, w, len(scopes), units(x).k) for x, w in zip(self.xs, self.ws, strict=True)
        }
        self.require(len(ks) == 1, "E108", f"weights give different unit counts {sorted(ks)}")
        return Units(ks.pop(), scopes)

    def eval(self, s: Semiring, *args: Values) -> Values:
        half = len(args) // 2
        ys = [s.contract("foi,fi->fo", w, x) for x, w in zip(args[:half], args[half:], strict=True)]
        y = ys[0]
        for z in ys[1:]:
            y = s.product(y, z)
        return y

    def madds(self) -> int:
        t = units(self)
        return t.folds * t.k * (sum(units(x).k for x in self.xs) + len(self.xs) - 1)


class Gather(CircuitOp, name="c.gather"):
    """Selection of folds: y[g,k] = x[folds[g],k]."""

    x: Op
    folds: tuple[int, ...]

    def infer(self) -> Type:
        t = units(self.x)
        ok = len(self.folds) > 0 and all(0 <= f < t.folds for f in self.folds)
        self.require(ok, "E109", f"folds {self.folds} are not within 0..{t.folds - 1}")
        return Units(t.k, tuple(t.scopes[f] for f in self.folds))

    def eval(self, s: Semiring, *args: Values) -> Values:
        return args[0][..., list(self.folds), :]


class Concat(CircuitOp, name="c.concat"):
    """All folds of several layers, one after another."""

    xs: tuple[Op, ...]

    def infer(self) -> Type:
        self.require(len(self.xs) > 0, "E103", "a layer needs at least one operand")
        k = _same_k(self, self.xs)
        return Units(k, tuple(s for x in self.xs for s in units(x).scopes))

    def eval(self, s: Semiring, *args: Values) -> Values:
        lead = np.broadcast_shapes(*(a.shape[:-2] for a in args))
        return np.concatenate([np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in args], axis=-2)


def expand(n: Op) -> Op:
    """Return the definition of a fused layer over unfused ones (other nodes are themselves)."""
    match n:
        case Tucker(a=a, b=b, w=w):
            from pcc.tensor.ops import Reshape

            f, o, i, j = tensor(w).shape
            return Sum(Kronecker(a, b), Reshape(w, (f, o, i * j)))
        case Cpt(xs=xs, w=w):
            return Sum(Hadamard(xs) if len(xs) > 1 else xs[0], w)
        case Cp(xs=xs, ws=ws):
            parts = tuple(Sum(x, w) for x, w in zip(xs, ws, strict=True))
            return Hadamard(parts) if len(parts) > 1 else parts[0]
        case _:
            return n
