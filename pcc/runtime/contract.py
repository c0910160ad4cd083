"""What a manifest must say about generation before anything is allocated from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pcc.errors import PccError
from pcc.knobs import MAX_STATE_BYTES, MAX_TOKENS
from pcc.runtime.dtypes import STORED
from pcc.runtime.philox import ROLES

GRAPHS = ("step", "step_greedy", "prefill", "prefill_greedy", "verify", "decode")


def check_generation(manifest: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Return the manifest's `generation`, or raise B215 where it is malformed."""
    found = manifest.get("generation")

    def need(ok: object, what: str) -> None:
        if not ok:
            hint = "it is damaged, or was not written by pcc"
            raise PccError("B215", f"the manifest's generation: {what}", at=at, hint=hint)

    need(isinstance(found, dict), "it is not an object")
    assert isinstance(found, dict)
    for key, most in (("n", 4096), ("vocab", MAX_TOKENS), ("max_seq", MAX_TOKENS),
                      ("chunk", 1 << 16), ("width", MAX_TOKENS)):  # fmt: skip
        need(type(found.get(key)) is int and 0 < found[key] <= most, f"{key!r} is out of range")
    for key in ("proposal", "draft_mode"):
        need(type(found.get(key)) is str, f"{key!r} is missing")
    need(isinstance(found.get("chat_template"), str | None), "'chat_template' is no text")
    need(found["n"] >= 2, "a window has two or more tokens")
    queries = manifest["queries"]
    need(all(g in queries for g in GRAPHS), f"it needs the graphs {', '.join(GRAPHS)}")
    _states(found, need)
    if any("batch" in spec for spec in queries.values()):
        _static(found, queries, need)
    random = found.get("random")
    need(isinstance(random, dict), "'random' is missing")
    for graph, slots in random.items() if isinstance(random, dict) else ():
        plain = isinstance(slots, list) and all(
            isinstance(s, list) and len(s) == 2 and isinstance(s[0], str) and s[0] in ROLES
            and type(s[1]) is int and 0 <= s[1] < 1 << 32
            for s in slots
        )  # fmt: skip
        need(plain, f"the slots of {str(graph)[:40]!r} are malformed")
        inputs = queries[graph]["inputs"] if graph in queries else []
        sizes = [i["shape"] for i in inputs if i["name"] == "u"]
        need(sizes == [["B", len(slots)]], f"'{graph}' does not read its slots")
    need({"step", "prefill"} <= set(random or ()), "'step' and 'prefill' need uniforms")
    _vocabulary(manifest.get("vocabulary"), found["vocab"], need)
    return found


def _states(found: Mapping[str, Any], need: Any) -> None:
    states, buckets = found.get("states"), found.get("buckets")
    need(isinstance(states, list) and isinstance(buckets, list) and buckets, "no states or buckets")
    names = set()
    for s in states or ():
        shape = s.get("shape") if isinstance(s, dict) else None
        need(
            shape is not None and _sizes(shape) and s.get("dtype") in tuple(STORED),
            "a state is malformed",
        )
        axis = s.get("rows_axis")
        inside = type(axis) is int and 0 <= axis < len(shape or ())
        need(axis is None or inside, "a state has no such axis")
        plain = type(s.get("name")) is str and type(s.get("ring")) is bool
        need(plain, "a state is malformed")
        names.add(s.get("name"))
    need(len(names) == len(states or ()), "states share a name")
    rows = 0
    for b in buckets or ():
        good = (
            isinstance(b, dict)
            and type(b.get("rows")) is int
            and rows < b["rows"] <= 2 * MAX_TOKENS
        )
        need(good and isinstance(b.get("states"), dict), "buckets are malformed")
        rows = b["rows"]
        for s in states or ():
            shape, base = b["states"].get(s["name"]), s["shape"]
            same = _sizes(shape) and len(shape) == len(base) and all(
                a == z or i == s["rows_axis"]
                for i, (a, z) in enumerate(zip(shape, base, strict=True))
            )  # fmt: skip
            need(same, f"bucket {rows} does not fit state {str(s['name'])[:40]!r}")
    need(rows >= found["max_seq"] + max(found["n"], found["chunk"]), "buckets are too small")


def _static(found: Mapping[str, Any], queries: Mapping[str, Any], need: Any) -> None:
    """Need one buffer size, that of `states`: kernels of fixed shapes write as far as that."""
    states = {s["name"]: s for s in found["states"]}
    for q in queries.values():
        for io in (*q["inputs"], *q["outputs"]):
            role, _, name = io["name"].partition(".")
            if role in ("past", "present"):
                s = states.get(name, {"dtype": None, "shape": ()})
                shape = io["shape"][1:]
                same = len(shape) == len(s["shape"]) and s["dtype"] == io["dtype"] and all(
                    a == b or isinstance(a, str) for a, b in zip(shape, s["shape"], strict=True)
                )  # fmt: skip
                need(same, f"{io['name'][:60]!r} is no state")
    shapes = {s["name"]: s["shape"] for s in found["states"]}
    buckets = found["buckets"]
    need(len(buckets) == 1, "static graphs have one buffer size")
    need(buckets[0]["states"] == shapes, "static graphs have the buffers of 'states'")


def _sizes(shape: object) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) < 17
        and all(type(d) is int and 0 < d for d in shape)
        and math.prod(shape) * 8 <= MAX_STATE_BYTES
    )


def _vocabulary(v: object, size: int, need: Any) -> None:
    need(isinstance(v, dict), "no vocabulary")
    assert isinstance(v, dict)
    eos = v.get("eos")
    listed = [v.get("bos"), v.get("pad"), *(eos if isinstance(eos, list) else [])]
    need(all(i is None or (type(i) is int and 0 <= i < size) for i in listed), "a token is no id")
    offset = v.get("byte_offset")
    need(offset is None or (type(offset) is int and 0 <= offset < size), "byte_offset is no id")
