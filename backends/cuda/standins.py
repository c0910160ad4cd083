"""What each hand-written kernel does, in numpy: for running plans where there is no GPU.

A stand-in reads the constants that the kernel is compiled with out of its source, takes the same
arrays, unpacks the packed weights and writes the same results, rounded where the kernel rounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pcc.backends.cuda.instance import TYPES
from pcc.backends.cuda.kernel import Kernel
from pcc.backends.cuda.pack import unpack_linear
from pcc.ir.array import dtype_of

Arrays = Mapping[str, np.ndarray[Any, Any]]
Traits = Mapping[str, Any]
_TRAIT = re.compile(r"static constexpr (?:int|bool|float) (\w+) = ([^;]+);")
_OPERAND = re.compile(r"using T = (\w+);")


def traits(source: str) -> dict[str, Any]:
    """Return the constants of an instance by name."""
    out: dict[str, Any] = {}
    for name, text in _TRAIT.findall(source):
        flag = {"true": True, "false": False}.get(text)
        out[name] = flag if flag is not None else float(text.removesuffix("f"))
    out = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in out.items()}
    if found := _OPERAND.search(source):
        out["T"] = next(kind for kind, name in TYPES.items() if name == found[1])
    return out


def stand_in(kernel: Kernel) -> Callable[[Arrays], None] | None:
    """Return what does a hand-written kernel's work on arrays by argument, None for others."""
    found = re.match(r'#include "(\w+)\.cuh"', kernel.source)
    work = STAND_INS.get(found[1]) if found else None
    if work is None:
        return None
    constants = traits(kernel.source)
    return lambda arrays: work(constants, arrays)


def copy(_: Traits, a: Arrays) -> None:
    """Y = x."""
    a["y"][...] = a["x"]


def linear(c: Traits, a: Arrays) -> None:
    """Z = round(x) W + b or (round(x) q) s + b, then the epilogue; see `library.linear`."""
    x, w = a["x"].astype(np.float64), unpack_linear(a["w"], c["K"], c["N"])
    if c["SOURCE"] == 2:
        total = a["squares"].astype(np.float64).sum(axis=1, keepdims=True)
        x = x / np.sqrt(total / c["K"] + c["EPS"]) * a["gain"]
    x = x.astype(np.float32).astype(dtype_of(c["T"])).astype(np.float64)
    z = x @ w.astype(np.float64)
    if c["SCALED"]:
        z = z * a["scales"]
    if c["BIAS"]:
        z = z + a["bias"]
    y = a["y"]
    if c["EPILOGUE"] == 2:
        gate, up = z[:, 0::2], z[:, 1::2]
        z = (_gelu(gate) if c["GELU"] else gate / (1 + np.exp(-gate))) * up
    elif c["EPILOGUE"] == 1:
        z = y.astype(np.float64) + z
    y[...] = z.astype(np.float32).astype(y.dtype)
    if c["SQUARES"]:
        _squares(z, a["squares_out"])


def rms_norm(c: Traits, a: Arrays) -> None:
    """Y = gain x / sqrt(mean(x^2) + eps)."""
    x = a["x"].astype(np.float64)
    y = a["gain"] * x / np.sqrt((x * x).mean(axis=1, keepdims=True) + c["EPS"])
    a["y"][...] = y.astype(np.float32).astype(a["y"].dtype)
    if c["WIDE"]:
        a["y32"][...] = y


def embedding(c: Traits, a: Arrays) -> None:
    """y_m = table[ids_m]."""
    y = a["table"][np.clip(a["ids"], 0, c["V"] - 1)].astype(np.float32)
    a["y"][...] = y
    if c["SQUARES"]:
        _squares(y, a["squares_out"])


def attend(c: Traits, a: Arrays) -> None:
    """Turn, write, summarise, attend; see `library.attend` and `library.eva_attend`."""
    batch, count, heads, keys, width = (c[k] for k in ("B", "N", "H", "HK", "D"))
    kind = a["key"].dtype
    qkv = a["qkv"].reshape(batch, count, heads + 2 * keys, width).astype(np.float64)
    out = a["y"].reshape(batch, count, heads, width)
    for b in range(batch):
        at = int(a["start"][b]) + np.arange(count)
        q, k = (_turned(c, a, x, at) for x in (qkv[b, :, :heads], qkv[b, :, heads : heads + keys]))
        slots = at % c["ROWS"] if c["EVA"] else at
        a["key"][b][:, slots] = k.astype(np.float32).astype(kind).swapaxes(0, 1)
        a["value"][b][:, slots] = qkv[b, :, heads + keys :].astype(kind).swapaxes(0, 1)
        if c["EVA"]:
            _summaries(c, a, b, int(at[0]))
        q = q.astype(np.float32).astype(kind).astype(np.float64)
        for i in range(count):
            rows = _seen(c, a, b, int(at[i]))
            for h in range(heads):
                k, v = (x[h * keys // heads] for x in rows)
                score = c["SCALE"] * (k @ q[i, h])
                weight = np.exp(score - score.max())
                out[b, i, h] = (weight / weight.sum() @ v).astype(np.float32).astype(out.dtype)


def _turned(c: Traits, a: Arrays, x: np.ndarray[Any, Any], at: Any) -> np.ndarray[Any, Any]:
    r = c["R"]
    if not r:
        return x
    cos, sin = a["cos"][at][:, None].astype(np.float64), a["sin"][at][:, None].astype(np.float64)
    low, high, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)


def _seen(c: Traits, a: Arrays, b: int, p: int) -> list[np.ndarray[Any, Any]]:
    """Return the keys and values [Hk,..,hd] that position p reads."""
    if not c["EVA"]:
        first = max(0, p + 1 - c["WINDOW"]) if c["WINDOW"] else 0
        return [a[x][b][:, first : p + 1].astype(np.float64) for x in ("key", "value")]
    begin = p // c["WINDOW"] * c["WINDOW"]
    slots, past = np.arange(begin, p + 1) % c["ROWS"], begin // c["CHUNK"]
    return [
        np.concatenate([a[x][b][:, slots], a[f"summary_{x}"][b][:, :past]], 1).astype(np.float64)
        for x in ("key", "value")
    ]


def _summaries(c: Traits, a: Arrays, b: int, start: int) -> None:
    """Write the summaries of all chunks that the pass may have touched."""
    first, root = start // c["CHUNK"], np.sqrt(c["D"])
    for chunk in range(first, first + c["CHUNKS"]):
        slots = (chunk * c["CHUNK"] + np.arange(c["CHUNK"])) % c["ROWS"]
        k, v = (a[x][b][:, slots].astype(np.float64) for x in ("key", "value"))
        near = ((a["phi"][:, None] - k * (0.5 / root)) * k).sum(-1)
        for name, score, x in (("key", (a["mu"][:, None] * k).sum(-1), k), ("value", near, v)):
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight = weight / weight.sum(axis=1, keepdims=True)
            to = a[f"summary_{name}"]
            to[b][:, chunk] = (weight[..., None] * x).sum(1).astype(np.float32).astype(to.dtype)


def _squares(y: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    padded = np.zeros((len(y), out.shape[1] * 32))
    padded[:, : y.shape[1]] = np.asarray(y, np.float32).astype(np.float64) ** 2
    out[...] = padded.reshape(len(y), -1, 32).sum(-1)


def _gelu(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from math import erf

    return np.asarray(0.5 * x * (1 + np.vectorize(erf, otypes=[np.float64])(x / np.sqrt(2))))


STAND_INS: Mapping[str, Callable[[Traits, Arrays], None]] = {
    "linear": linear, "narrow": linear, "linear32": linear, "rms_norm": rms_norm,
    "embedding": embedding, "attend": attend,
}  # fmt: skip
