"""The carriers that circuits are evaluated in.

A `Semiring` says what a product and a weighted sum are. Values are arrays `[rows?, F, K]`; weights
are carried linearly (float64, a residue, a symbol), values in the carrier's own form.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar

import numpy as np

from pcc.errors import PccError
from pcc.ir.core import Values

P31 = 2_147_483_647


def split_equation(eq: str) -> tuple[list[str], str]:
    """Split an einsum equation over per-row axes into its operand terms and its result."""
    ins, out = eq.split("->")
    return ins.split(","), out


def rows(eq: str) -> str:
    """Give every term of an equation a leading ellipsis, for the batch axis."""
    ins, out = split_equation(eq)
    return ",".join("..." + t for t in ins) + "->..." + out


class Semiring:
    """Linear carriers: real numbers. The base of the others."""

    name: ClassVar[str] = "real"
    exact: ClassVar[bool] = False

    def const(self, value: Values, ref: str) -> Values:
        """Carry a trained array."""
        return value.astype(np.float64) if value.dtype.kind == "f" else value

    def random_leaf(self, shape: tuple[int, ...], key: str) -> Values:
        """Stand in for a value that is not a polynomial of what is before it."""
        raise PccError("E401", f"the {self.name} carrier evaluates every op")

    def add(self, a: Values, b: Values) -> Values:
        """Return a + b."""
        return np.asarray(a + b)

    def sub(self, a: Values, b: Values) -> Values:
        """Return a - b."""
        return np.asarray(a - b)

    def mul(self, a: Values, b: Values) -> Values:
        """Return the product of two values of this carrier (parameters and linear carriers)."""
        return np.asarray(a * b)

    def einsum(self, eq: str, *xs: Values) -> Values:
        """Contract linear arrays; `eq` already has its ellipses."""
        return np.asarray(np.einsum(eq, *xs))

    # What circuit ops use. `product` and `contract` act on unit values.
    def product(self, a: Values, b: Values) -> Values:
        """Multiply unit values."""
        return self.mul(a, b)

    def contract(self, eq: str, w: Values | None, *xs: Values) -> Values:
        """Weighted sum of products of unit values: einsum(eq, w, *xs), `w` linear or absent."""
        return self.einsum(rows(eq), *([] if w is None else [w]), *xs)

    def unit(self, p: Values) -> Values:
        """Turn linear input values into unit values."""
        return p

    def linear(self, x: Values) -> Values:
        """Turn unit values back into linear values."""
        return x


class Real(Semiring):
    """Plain linear arithmetic in extended precision where the machine has it."""

    def const(self, value: Values, ref: str) -> Values:
        return value.astype(np.longdouble) if value.dtype.kind == "f" else value


class LogReal(Semiring):
    """float64 with unit values held as logarithms: the judge. Sums are shifted by their maxima."""

    name = "log-real"

    def product(self, a: Values, b: Values) -> Values:
        return np.asarray(a + b)

    def contract(self, eq: str, w: Values | None, *xs: Values) -> Values:
        return log_einsum(eq, w, *xs)

    def unit(self, p: Values) -> Values:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(p))

    def linear(self, x: Values) -> Values:
        return np.asarray(np.exp(x))


TINY = 1e-200  # a shifted sum below this may have lost terms: it is summed again, term by term


def log_einsum(eq: str, w: Values | None, *xs: Values) -> Values:
    """Log of einsum(eq, w, exp(xs)..): `w` linear or absent, `xs` shifted by their maxima.

    Where the largest x meets a zero weight the shifted sum underflows; such rows are summed again
    with one shift for each result.
    """
    terms, out = split_equation(eq)
    names = terms[1:] if w is not None else terms
    shift: Values = np.zeros(())
    scaled = []
    for t, x in zip(names, xs, strict=True):
        gone = tuple(i - len(t) for i, c in enumerate(t) if c not in out)
        top = x if not gone else x.max(axis=gone, keepdims=True)
        top = np.where(np.isneginf(top), 0.0, top)
        scaled.append(np.exp(x - top))
        kept = np.squeeze(top, axis=gone) if gone else top
        left = "".join(c for c in t if c in out)
        shift = shift + _spread(kept, left, out)
    y = np.asarray(np.einsum(rows(eq), *([] if w is None else [w]), *scaled))
    with np.errstate(divide="ignore"):
        total = np.asarray(np.log(y) + shift)
        logs = list(xs) if w is None else [np.log(w), *xs]
    lost = y < TINY
    if lost.any() and (again := _lost_rows(eq, lost, logs)).size:
        total = np.array(np.broadcast_to(total, y.shape))
        if y.ndim == len(out):
            return _log_sum(eq, *logs)
        for r in again:
            pairs = zip(terms, logs, strict=True)
            part = [x[r % len(x)] if x.ndim > len(t) else x for t, x in pairs]
            total[r] = _log_sum(eq, *part).reshape(total[r].shape)
    return total


def _lost_rows(eq: str, lost: Values, logs: list[Values]) -> Values:
    """Return the rows (or [0] without a batch axis) where a lost sum has a positive term."""
    some = np.einsum(rows(eq), *((~np.isneginf(x)).astype(np.float64) for x in logs))
    bad = np.atleast_2d((lost & (some > 0)).reshape(len(lost) if lost.ndim else 1, -1))
    return np.flatnonzero(bad.any(axis=1))


def _log_sum(eq: str, *logs: Values) -> Values:
    """Log of einsum(eq, exp(logs)..), each result shifted by its own largest term."""
    total, gone, order = _terms(eq, *logs)
    top = total.max(axis=gone, keepdims=True) if gone else total
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        y = np.log(np.exp(total - top).sum(axis=gone, keepdims=True)) + top
    y = np.squeeze(y, axis=gone)
    lead = y.ndim - len(order)
    return np.asarray(y.transpose(*range(lead), *(lead + i for i in order)))


def _terms(eq: str, *logs: Values) -> tuple[Values, tuple[int, ...], list[int]]:
    """Return every term of a contraction in logs, the axes to reduce, and the result's order."""
    ins, out = split_equation(eq)
    letters = "".join(dict.fromkeys("".join(ins) + out))
    total: Values = np.zeros(())
    for t, x in zip(ins, logs, strict=True):
        total = total + _spread(x, t, letters)
    left = [c for c in letters if c in out]
    gone = tuple(i - len(letters) for i, c in enumerate(letters) if c not in out)
    return total, gone, [left.index(c) for c in out]


class MaxPlus(LogReal):
    """Max-product over logs: a sum is replaced by its largest term."""

    name = "max-plus"

    def contract(self, eq: str, w: Values | None, *xs: Values) -> Values:
        logs = xs if w is None else (self.unit(w), *xs)
        total, gone, order = _terms(eq, *logs)
        best = total.max(axis=gone) if gone else total
        lead = best.ndim - len(order)
        return np.asarray(best.transpose(*range(lead), *(lead + i for i in order)))


def _spread(x: Values, have: str, want: str) -> Values:
    """View trailing axes `have` as trailing axes `want`; new axes have size 1."""
    lead = x.ndim - len(have)
    order = [have.index(c) for c in want if c in have]
    x = x.transpose(*range(lead), *(lead + i for i in order))
    index = (..., *(slice(None) if c in have else None for c in want))
    return x[index]


class Field(Semiring):
    """Integers mod 2^31 - 1: exact, so equality needs no tolerance (Schwartz-Zippel).

    Trained constants and non-polynomial values become random residues keyed by content, so the same
    leaf has the same value before and after a pass. Zero stays zero and one stays one.
    """

    name = "GF(2^31-1)"
    exact = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def _random(self, shape: tuple[int, ...], key: str) -> Values:
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        return rng.integers(2, P31, shape, dtype=np.int64)

    def const(self, value: Values, ref: str) -> Values:
        if value.dtype.kind != "f":
            return value
        # Equal numbers get equal residues, wherever they stand: concatenating or slicing constants
        # must commute with this map. splitmix64 of the float's bits.
        z = value.astype("<f4").view("<u4").astype(np.uint64) + np.uint64(self.seed * 0x9E37 + 1)
        with np.errstate(over="ignore"):
            z = z * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) % np.uint64(P31 - 2) + np.uint64(2)
        out = z.astype(np.int64)
        return np.where(value == 0, 0, np.where(value == 1, 1, out))

    def random_leaf(self, shape: tuple[int, ...], key: str) -> Values:
        return self._random(shape, key)

    def add(self, a: Values, b: Values) -> Values:
        return np.asarray((a + b) % P31)

    def sub(self, a: Values, b: Values) -> Values:
        return np.asarray((a - b) % P31)

    def mul(self, a: Values, b: Values) -> Values:
        return np.asarray((a * b) % P31)  # both < 2^31: the product fits 62 bits

    def einsum(self, eq: str, *xs: Values) -> Values:
        ins, out = eq.split("->")
        terms = ins.split(",")
        acc, names = xs[0] % P31, terms[0].replace("...", "")
        later = [t.replace("...", "") for t in terms[1:]]
        for i, x in enumerate(xs[1:]):
            need = set("".join(later[i + 1 :]) + out)
            both = "".join(c for c in dict.fromkeys(names + later[i]) if c in need)
            step = f"...{names},...{later[i]}->...{both}"
            # 16 x 31 bits: sums of 2^16 such products still fit int64
            high, low = acc >> 16, acc & 0xFFFF
            b = x % P31
            top = np.einsum(step, high, b) % P31
            acc = (top * 65536 + np.einsum(step, low, b)) % P31
            names = both
        left = "..." + names + "->..." + out.replace("...", "")
        return np.asarray(np.einsum(left, acc) % P31)


class Symbolic(Semiring):
    """Arrays of sympy expressions: for proofs of rewrite rules at small sizes."""

    name = "symbolic"
    exact = True

    def const(self, value: Values, ref: str) -> Values:
        import sympy

        if value.dtype.kind != "f":
            return value
        out = np.empty(value.shape, object)
        for i in np.ndindex(*value.shape):
            bits = float(value[i])
            # Equal numbers are one symbol; zero and one are themselves.
            number = {0.0: sympy.Integer(0), 1.0: sympy.Integer(1)}
            out[i] = number.get(bits, sympy.Symbol(f"w_{bits.hex()}", positive=True))
        return out

    def random_leaf(self, shape: tuple[int, ...], key: str) -> Values:
        import sympy

        out = np.empty(shape, object)
        for i in np.ndindex(*shape):
            out[i] = sympy.Symbol(f"{key}_{'_'.join(map(str, i))}", positive=True)
        return out
