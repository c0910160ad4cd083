"""How far float32 may be from float64: 5e-5, and what rounding makes of a large logarithm.

The graphs add up about n logarithms, of which the largest is that of a joint probability, J. Each
addition rounds by at most |J| 2^-24, in either direction, so that n of them move the result by
about sqrt(n) of that (Higham and Mary 2019: below lambda sqrt(n) u |J| with high probability):

    |float32 - float64| <= 5e-5 + 2 sqrt(n) 2^-24 |J|

A conditional is the difference of two joints: it is as exact as they are, however close to 0 it is.

Where a head's projections are stored in half precision, implementations may also round the scores
that they give, by 2^-11 (f16) or 2^-8 (bf16) of each; a log-softmax doubles that, and a joint has n
of them with independent signs. Scores are taken as up to 16, which is a probability of e^-16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pcc.circuit.circuit import Circuit
from pcc.interp.reference import log_joint
from pcc.ir.core import Values

TOLERANCE = 5e-5
UNIT = 2.0**-24  # of float32: half the distance of two numbers, relative to the larger
LAMBDA = 2.0
HALF_UNIT = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
SCORE = 16.0


def bounds(
    circuit: Circuit, query: str, inputs: Mapping[str, Values], outputs: Mapping[str, Values]
) -> dict[str, Values]:
    """Return by output how far it may be off, as arrays that broadcast with it.

    `outputs` are float64; integers and draft laws, which are no logarithms, have no second term.
    """
    unit = LAMBDA * math.sqrt(circuit.n) * UNIT
    half = LAMBDA * math.sqrt(circuit.n) * HALF_UNIT[circuit.module().stored] * SCORE
    return {
        name: TOLERANCE + half + unit * joint
        for name, joint in _joints(circuit, query, inputs, outputs).items()
    }


def _joints(
    circuit: Circuit, query: str, inputs: Mapping[str, Values], outputs: Mapping[str, Values]
) -> dict[str, Values]:
    """Return by output |J|, the largest finite logarithm of a joint that it is made of."""
    logs = {k: _finite(np.asarray(v, np.float64)) for k, v in outputs.items()}
    x = np.asarray(inputs.get("x", outputs.get("x")))
    match query:
        case "conditional":
            given = _finite(log_joint(circuit, inputs, np.asarray(inputs["observed"])))
            return {"log_prob": np.maximum(abs(given), abs(given + logs["log_prob"]))}
        case "univariate":
            given = _finite(log_joint(circuit, inputs, np.asarray(inputs["observed"])))
            return {"log_marg": abs(given)[:, None, None] + abs(logs["log_marg"])}
        case "prefix" | "conditionals":
            steps = logs["log_cond"]
            if query == "conditionals":
                at = x.astype(np.int64)[..., None]
                steps = np.take_along_axis(steps, at, axis=-1)[..., 0]
            total = _finite(log_joint(circuit, inputs, np.zeros(x.shape, bool)))[:, None]
            joint = np.maximum(abs(total), abs(total + steps.cumsum(axis=1)).max(1, keepdims=True))
            return {
                "log_cond": joint if query == "prefix" else joint[..., None] + abs(logs["log_cond"])
            }
        case "draft":
            return dict.fromkeys(outputs, np.zeros(()))
        case _:
            return {k: abs(v) if k.startswith("log") else np.zeros(()) for k, v in logs.items()}


def _finite(v: Values) -> Values:
    return np.where(np.isfinite(v), v, 0.0)


def error(want: Values, got: Values, bound: Values) -> tuple[float, float]:
    """Return the difference that is largest beside its bound, and that bound.

    Equal infinities differ by 0, integers by 0 or infinity, NaN by infinity.
    """
    if want.shape != got.shape or np.isnan(got.astype(float)).any():
        return math.inf, TOLERANCE
    if want.dtype.kind in "ib":
        return (0.0 if np.array_equal(want, got) else math.inf), 0.0
    if not want.size:
        return 0.0, TOLERANCE
    with np.errstate(invalid="ignore"):
        off = np.where(want == got, 0.0, np.abs(want - got))
    wide = np.broadcast_to(bound, off.shape)
    at = np.unravel_index(int((off / wide).argmax()), off.shape)
    return float(off[at]), float(wide[at])
