"""Edge inputs: rows of -inf, masses that are zero or one-hot, uniforms at the ends of [0, 1).

A kind names what an operand is: "finite", "log" (whole rows may be -inf), "logits" (some entry of
each row is above -inf), "mass", "positive", "uniform", "bool", "integer", "count", "index:N" (below
N), "sizes:A:B:.." (one of these numbers), "tiny" (positive, down to the smallest float), "faint"
(masses of which all but one or none of a row are below the smallest normal float), "exponent"
(what exp leaves a normal float). "finite@f16" is held in half precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
DTYPE = {"index": "i64", "integer": "i64", "count": "i64", "sizes": "i64", "bool": "bool"}


def stored(kind: str) -> str:
    """Return the dtype in which an operand of a kind is held."""
    name, _, half = kind.partition("@")
    return half or DTYPE.get(name.partition(":")[0], "f32")


def values(kind: str, rows: int, shape: tuple[int, ...], seed: int) -> Values:
    """Return `rows` arrays of a kind; the edge patterns come first, so few rows hold them too."""
    rng = np.random.default_rng([seed, rows, len(shape)])
    full = (rows, *shape)
    name, _, half = kind.partition("@")
    if half:
        return rounded(values(name, rows, shape, seed), half)
    name, _, limit = name.partition(":")
    if name in DTYPE:
        return _discrete(name, limit, full, rng)
    match name:
        case "uniform":
            edges = np.array([0.0, 2.0**-24, 1 - 2.0**-24], np.float32)
            some = rng.integers(0, 1 << 24, full) / (1 << 24)
            return np.where(rng.random(full) < 0.6, rng.choice(edges, full), some).astype("f4")
        case "setting":  # a temperature or a nucleus: off, cut, and at its ends
            return rng.choice(np.array([0.0, 0.3, 0.8, 1.0, 1.5], np.float32), full)
        case "mass":
            return _mass(full, rng)
        case "law":  # like a mass, with something in each row
            a = _mass(full, rng)
            a[..., 0] += np.float32(0.125)
            return a
        case "tiny":  # quotients of two of them are normal floats
            return np.ldexp(rng.uniform(1.0, 2.0, full), rng.integers(-140, -99, full)).astype("f4")
        case "faint":
            return _faint(full, rng)
        case "exponent":
            return rng.uniform(-80.0, 3.0, full).astype(np.float32)
        case "positive":
            return rng.uniform(0.1, 2.0, full).astype(np.float32)
        case "log" | "logits":
            return _log(full, rng, whole=name == "log")
        case "finite":
            return (3 * rng.normal(size=full)).astype(np.float32)
        case _:
            raise ValueError(f"no values are of kind {kind!r}")


def _discrete(name: str, limit: str, full: tuple[int, ...], rng: np.random.Generator) -> Values:
    """Return integers or truth values of a kind of `DTYPE`."""
    match name:
        case "index":
            return rng.integers(0, int(limit), full)
        case "integer":
            return rng.integers(-4, 9, full)
        case "count":
            return rng.integers(0, 40, full)
        case "sizes":
            return rng.choice([int(v) for v in limit.split(":")], full)
        case "bool":
            return rng.random(full) < 0.5
        case _:
            raise ValueError(f"no integers are of kind {name!r}")


def rounded(a: Values, dtype: str) -> Values:
    """Return an array rounded to f16 or bf16, held as such."""
    if dtype == "f16":
        return a.astype(np.float16)
    import ml_dtypes

    return a.astype(ml_dtypes.bfloat16)


def _mass(full: tuple[int, ...], rng: np.random.Generator) -> Values:
    a = rng.uniform(0.0, 1.0, full).astype(np.float32)
    a[rng.random(full) < 0.3] = 0.0
    if len(full) > 1 and a.size:
        flat = a.reshape(-1, full[-1])  # rows of the last axis
        flat[::5] = 0.0
        flat[::5, rng.integers(full[-1])] = 1.0  # one-hot
        flat[2::7] = 0.0  # nothing at all
    return a


def _faint(full: tuple[int, ...], rng: np.random.Generator) -> Values:
    """Rows of zeros and subnormal numbers; some have a one, whose sums are exact beside those.

    Rows without a one have a single mass: every uniform must find it.
    """
    v = full[-1]
    flat = np.zeros((int(np.prod(full[:-1], dtype=np.int64)), v), np.float32)
    for k, row in enumerate(flat):
        faint = np.ldexp(1.0, rng.integers(-149, -126, v)).astype(np.float32)
        if k % 3 == 0:
            at = rng.integers(v)
            row[at] = faint[at]
        else:
            row[:] = np.where(rng.random(v) < 0.6, faint, 0.0)
            row[rng.integers(v)] = 1.0
    return flat.reshape(full)


def _log(full: tuple[int, ...], rng: np.random.Generator, *, whole: bool) -> Values:
    a = (5 * rng.normal(size=full)).astype(np.float32)
    a[rng.random(full) < 0.25] = -np.inf
    if len(full) > 1:
        flat = a.reshape(-1, full[-1])
        flat[::6] -= 300.0  # far below the smallest float
        if whole:
            flat[1::5] = -np.inf
        else:
            flat[:, 0] = np.where(np.isneginf(flat).all(axis=-1), 0.5, flat[:, 0])
    elif whole:
        a[1::5] = -np.inf
    return a
