"""A loaded bundle: `engine.run(query, **inputs)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcc.bundle import inside, read_manifest
from pcc.errors import PccError
from pcc.runtime.ort import check_opset, open_session

Values = np.ndarray[Any, Any]
DTYPES: dict[str, Any] = {"f32": np.float32, "i64": np.int64, "bool": np.bool_}
OPTIONAL = ("x", "observed")  # filled with zeros and False


class Engine:
    """The queries of one bundle, under ONNX Runtime. Sessions open when first used."""

    def __init__(self, path: Path, provider: str, threads: int | None) -> None:
        self.path, self.provider, self.threads = path, provider, threads
        self.manifest = read_manifest(path)
        self.queries: dict[str, dict[str, Any]] = self.manifest["queries"]
        check_opset(int(self.manifest.get("opset", 0)))
        self.cards = np.array([c or 0 for c in self.manifest["circuit"]["cards"]], np.int64)
        self._sessions: dict[str, Any] = {}

    def session_of(self, query: str) -> Any:
        """Return the ONNX Runtime session of a query."""
        if query not in self.queries:
            reason = self.manifest.get("unsupported", {}).get(query)
            raise PccError(
                "R101",
                f"the bundle has no query {query!r}" + (f": {reason}" if reason else ""),
                hint=f"it has {', '.join(self.queries)}",
            )
        if query not in self._sessions:
            graph = inside(self.path, self.queries[query]["graph"])
            self._sessions[query] = open_session(graph, self.provider, self.threads)
        return self._sessions[query]

    def run(self, query: str, **inputs: Values) -> dict[str, Values]:
        """Return the outputs of a query by name.

        Inputs and outputs: see the table of queries in the documentation. Absent `x` and `observed`
        are zeros and False. Raises `PccError` for wrong shapes, NaN, and values out of range.
        """
        session = self.session_of(query)
        spec = self.queries[query]
        feed = self._feed(spec, inputs)
        values = session.run([o["onnx"] for o in spec["outputs"]], feed)
        return {o["name"]: v for o, v in zip(spec["outputs"], values, strict=True)}

    def _feed(self, spec: Mapping[str, Any], inputs: Mapping[str, Values]) -> dict[str, Values]:
        names = {i["name"]: i for i in spec["inputs"]}
        if unknown := [k for k in inputs if k not in names]:
            raise PccError("R102", f"unknown inputs {unknown}", hint=f"it takes {list(names)}")
        rows = self._rows(names, inputs)
        feed: dict[str, Values] = {}
        for name, i in names.items():
            if name in inputs:
                feed[name] = _convert(name, i, inputs[name], rows)
            elif name in OPTIONAL:
                feed[name] = np.zeros((rows, *i["shape"][1:]), DTYPES[i["dtype"]])
            else:
                raise PccError("R103", f"input {name!r} is missing", hint=_describe(i))
        self._ranges(feed, inputs)
        return feed

    def _rows(self, names: Mapping[str, Any], inputs: Mapping[str, Values]) -> int:
        sizes = {
            k: np.shape(v)[0]
            for k, v in inputs.items()
            if names[k]["shape"][:1] == ["B"] and np.ndim(v)
        }
        sizes = sizes or {
            k: np.shape(v)[0] for k, v in inputs.items() if names[k]["shape"][:1] == ["Bc"]
        }
        if len(set(sizes.values())) > 1:
            raise PccError("R104", f"inputs have different numbers of rows: {sizes}")
        return next(iter(sizes.values()), 1)

    def _ranges(self, feed: Mapping[str, Values], given: Mapping[str, Values]) -> None:
        if "x" in feed and "x" in given:
            x, seen = feed["x"], feed.get("observed")
            target = feed.get("target")
            if seen is not None and target is not None:
                seen = seen | target
            bad = (
                (x < 0) | (x >= self.cards) | (x != np.floor(x))
                if x.dtype.kind == "f"
                else ((x < 0) | (x >= self.cards))
            )
            bad = np.where(self.cards > 0, bad, ~np.isfinite(x))
            _refuse("x", bad if seen is None else bad & seen, x)
        if "carry" in feed:
            carry = feed["carry"]
            _refuse("carry", (carry < 0) | (carry >= self.cards[0]), carry)
        if "u" in feed:
            u = feed["u"]
            _refuse("u", ~((u >= 0) & (u < 1)), u)
        for name in feed:
            if name == "context" or "logits" in name:
                a = feed[name]
                if np.isfinite(np.add.reduce(a, axis=None)):
                    continue  # no NaN and no infinity: one cheap pass instead of two
                bad = np.isnan(a) | (np.isposinf(a) if "logits" in name else np.isinf(a))
                if bad.any():
                    _refuse(name, bad, a)


def _refuse(name: str, bad: Values, value: Values) -> None:
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise PccError(
            "R105",
            f"input {name!r} at {at} is {value[at]!s}: out of range",
            hint="observed values lie in 0..V_i-1, uniforms in [0, 1); NaN is an error",
        )


def _convert(name: str, spec: Mapping[str, Any], value: Any, rows: int) -> Values:
    a = np.asarray(value)
    kind = DTYPES[spec["dtype"]]
    allowed = {"f32": "fiu", "i64": "iu", "bool": "b"}[spec["dtype"]]
    if a.dtype.kind not in allowed:
        raise PccError("R106", f"input {name!r} has dtype {a.dtype}", hint=_describe(spec))
    first = rows if spec["shape"][:1] == ["B"] else None
    want = spec["shape"][1:]
    ok = a.ndim == len(spec["shape"]) and list(a.shape[1:]) == want
    ok = ok and (a.shape[0] == first if first is not None else a.shape[0] in (1, rows))
    if not ok or (not a.size and rows == 0):
        raise PccError("R104", f"input {name!r} has shape {a.shape}", hint=_describe(spec))
    return np.ascontiguousarray(a, kind)


def _describe(spec: Mapping[str, Any]) -> str:
    shape = ",".join(map(str, spec["shape"]))
    return f"'{spec['name']}' is {spec['dtype']}[{shape}] (B rows; Bc is B or 1)"


def load(path: str | Path, provider: str = "cpu", threads: int | None = None) -> Engine:
    """Open a bundle for running; checks schema, hashes, versions and the provider."""
    return Engine(Path(path), provider, threads)
