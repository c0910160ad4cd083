"""A loaded bundle: `engine.run(query, **inputs)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.bundle import read_manifest
from pcc.errors import PccError
from pcc.knobs import MAX_THREADS
from pcc.runtime.dtypes import NUMPY
from pcc.runtime.ort import KNOWN
from pcc.runtime.runner import HostRunner, Runner, runner_of

if TYPE_CHECKING:
    from pcc.runtime.session import Session

Values = np.ndarray[Any, Any]
OPTIONAL = ("x", "observed")  # filled with zeros and False


class Engine:
    """The queries of one bundle. Sessions of ONNX Runtime open when first used.

    `runner`: what runs the graphs instead of what the provider has (the suite's own engines).
    """

    def __init__(
        self,
        path: Path,
        provider: str,
        threads: int | None,
        progress: Callable[[str], None] | None = None,
        runner: Callable[[Engine], Runner] | None = None,
    ) -> None:
        if not isinstance(provider, str) or provider not in KNOWN:
            hint = f"one of {', '.join(KNOWN)}"
            raise PccError("R108", f"unknown provider {str(provider)[:60]!r}", hint=hint)
        if threads is not None and (type(threads) is not int or not 0 < threads <= MAX_THREADS):
            raise PccError(
                "R107",
                f"threads={str(threads)[:60]!r}",
                hint=f"1 to {MAX_THREADS}, or leave it out",
            )
        self.path, self.provider, self.threads = path, provider, threads
        self.progress = progress
        self.manifest = read_manifest(path)
        self.queries: dict[str, dict[str, Any]] = self.manifest["queries"]
        self.cards = np.array([c or 0 for c in self.manifest["circuit"]["cards"]], np.int64)
        self.run_ahead = True  # on a device, rounds are launched before the last one is looked at
        self._generation: dict[str, Any] | None = None
        if self.manifest["generation"] is not None:
            from pcc.runtime.contract import check_generation

            self._generation = check_generation(self.manifest, str(path))
        self.runner = (runner or runner_of)(self)

    def spec_of(self, query: str) -> dict[str, Any]:
        """Return the manifest's entry of a query, which the bundle must have."""
        if not isinstance(query, str) or query not in self.queries:
            reason = self.manifest["unsupported"].get(str(query))
            raise PccError(
                "R101",
                f"the bundle has no query {query!r}" + (f": {reason}" if reason else ""),
                hint=f"it has {', '.join(self.queries)}",
            )
        return self.queries[query]

    def session_of(self, query: str, rows: int = 0) -> Any:
        """Return the ONNX Runtime session of a query on the host: see `HostRunner.session_of`."""
        self.spec_of(query)
        if not isinstance(self.runner, HostRunner):
            raise PccError("R115", f"'{query}' runs on a device, not in a session of the host")
        return self.runner.session_of(query, rows)

    def executor(self, query: str) -> tuple[Any, Any]:
        """Return a device, and a query's graph on it with nothing bound (docs/runtime.md)."""
        self.spec_of(query)
        return self.runner.executor(query)

    @property
    def opened(self) -> dict[str, Any]:
        """ONNX Runtime sessions that are open, by graph."""
        return dict(self.runner.opened)

    def generation(self) -> dict[str, Any]:
        """Return what the manifest says about generation; bundles without a verifier have none."""
        if self._generation is None:
            raise PccError(
                "R110",
                "the bundle has no verifier, so it cannot generate",
                hint="compile it with --verifier MODEL_DIR",
            )
        return self._generation

    def session(self, **options: Any) -> Session:
        """Open a generation session: seed, temperature, top_p, top_k, greedy, stream.

        Also draft_temperature and draft_top_p, which change the acceptance, not the law.
        """
        from pcc.runtime.session import Session

        return Session(self, **options)

    def run(self, query: str, /, **inputs: Values) -> dict[str, Values]:
        """Return the outputs of a query by name.

        Inputs and outputs: see the table of queries in the documentation. Absent `x` and `observed`
        are zeros and False. Raises `PccError` for wrong shapes, NaN, and values out of range.
        """
        spec = self.spec_of(query)
        feed = self._feed(spec, {k: _array(k, v) for k, v in inputs.items()})
        rows = next((len(feed[i["name"]]) for i in spec["inputs"] if i["shape"][:1] == ["Bc"]), 0)
        values = self.runner.answer(query, feed, rows)
        found = {o["name"]: v for o, v in zip(spec["outputs"], values, strict=True)}
        for name, value in found.items():
            _check_finite(query, name, value)
        return found

    def _feed(self, spec: Mapping[str, Any], inputs: Mapping[str, Values]) -> dict[str, Values]:
        names = {i["name"]: i for i in spec["inputs"]}
        if unknown := [k for k in inputs if k not in names]:
            what = f"unknown inputs {[k[:40] for k in unknown[:10]]}"
            raise PccError("R102", what, hint=f"it takes {', '.join(names)}")
        rows = self._rows(names, inputs)
        fixed = spec.get("batch")  # of graphs with static shapes
        if fixed is not None and rows != fixed:
            what, hint = f"{rows} rows, the graph takes {fixed}", f"compile with --batch {rows}"
            raise PccError("R104", what, hint=hint)
        feed: dict[str, Values] = {}
        for name, i in names.items():
            if name in inputs:
                feed[name] = _convert(name, i, inputs[name], rows)
            elif name in OPTIONAL:
                feed[name] = np.zeros((rows, *i["shape"][1:]), NUMPY[i["dtype"]])
            else:
                raise PccError("R103", f"input {name!r} is missing", hint=_describe(i))
        self._ranges(feed, inputs)
        if fixed is not None:  # one row of what depends on the context serves all
            shared = [n for n, i in names.items() if i["shape"][:1] == ["Bc"]]
            feed |= {n: np.repeat(feed[n], fixed // len(feed[n]), axis=0) for n in shared}
        return feed

    def _rows(self, names: Mapping[str, Any], inputs: Mapping[str, Values]) -> int:
        sizes = {k: len(v) for k, v in inputs.items() if names[k]["shape"][:1] == ["B"] and v.ndim}
        sizes = sizes or {
            k: len(v) for k, v in inputs.items() if names[k]["shape"][:1] == ["Bc"] and v.ndim
        }
        if len(set(sizes.values())) > 1:
            raise PccError("R104", f"inputs have different numbers of rows: {sizes}")
        return next(iter(sizes.values()), 1)

    def _ranges(self, feed: Mapping[str, Values], given: Mapping[str, Values]) -> None:
        if "x" in given:
            _refuse("x", self._impossible(feed), feed["x"])
        if "carry" in feed:
            carry = feed["carry"]
            if not (0 <= carry.min() and carry.max() < self.cards[0]):
                _refuse("carry", (carry < 0) | (carry >= self.cards[0]), carry)
        if "u" in feed:
            u = feed["u"]
            if u.size and not (0 <= u.min() and u.max() < 1):  # NaN fails either test
                _refuse("u", ~((u >= 0) & (u < 1)), u)
        real = [name for name in feed if name == "context" or "logits" in name]
        if not real:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            sums = [np.add.reduce(feed[name], axis=None) for name in real]
        for name, total in zip(real, sums, strict=True):
            if not math.isfinite(total):  # NaN, an infinity or an overflow of this sum: look closer
                _refuse(name, _unusable(name, feed[name]), feed[name])

    def _impossible(self, feed: Mapping[str, Values]) -> Values:
        """Return where x is NaN, or observed (or a target) and not a value of its variable."""
        x, finite = feed["x"], self.cards > 0
        if x.dtype.kind != "f" and x.size and x.min() >= 0 and (x.max(axis=0) < self.cards).all():
            return np.zeros(1, bool)
        bad: Values = (x < 0) | (x >= self.cards)
        seen = np.ones_like(bad) if "observed" not in feed else feed["observed"]
        if "target" in feed:
            seen = seen | feed["target"]
        if x.dtype.kind != "f":
            return bad & seen
        bad = np.where(finite, bad | (x != np.floor(x)), ~np.isfinite(x))
        return np.asarray((bad & seen) | np.isnan(x))


def _unusable(name: str, a: Values) -> Values:
    """Return where a parameter is NaN or infinite; logits may be -inf, but not all of a row."""
    if "logits" not in name:
        return ~np.isfinite(a)
    nothing = np.isneginf(a).all(axis=-1, keepdims=True)
    return np.isnan(a) | np.isposinf(a) | nothing


def _refuse(name: str, bad: Values, value: Values) -> None:
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise PccError(
            "R105",
            f"input {name!r} at {at} is {value[at]!s}: out of range",
            hint="observed values lie in 0..V_i-1, uniforms in [0, 1); NaN is an error",
        )


def _array(name: str, value: Any) -> Values:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as e:  # rows of unequal lengths
        raise PccError("R106", f"input {name[:40]!r} is no array: {e}") from None


def _check_finite(query: str, name: str, value: Values) -> None:
    """Refuse NaN: finite inputs give it only where a number on the way left float32's range."""
    if value.dtype.kind != "f" or not value.size or not np.isnan(value.max()):
        return
    row = int(np.argwhere(np.isnan(value))[0][0]) if value.ndim else 0
    raise PccError(
        "R109",
        f"'{query}' has no number for {name!r} in row {row}: float32 overflowed",
        hint="the context or the logits of that row are too large: scale them down",
    )


def _convert(name: str, spec: Mapping[str, Any], a: Values, rows: int) -> Values:
    kind = NUMPY[spec["dtype"]]
    allowed = {"f32": "fiu", "i64": "iu", "bool": "b"}[spec["dtype"]]
    if a.dtype.kind not in allowed:
        raise PccError("R106", f"input {name!r} has dtype {a.dtype}", hint=_describe(spec))
    first = rows if spec["shape"][:1] == ["B"] else None
    want = spec["shape"][1:]
    ok = a.ndim == len(spec["shape"]) and list(a.shape[1:]) == want
    ok = ok and (a.shape[0] == first if first is not None else a.shape[0] in (1, rows))
    if not ok or (not a.size and rows == 0):
        raise PccError("R104", f"input {name!r} has shape {a.shape}", hint=_describe(spec))
    if a.dtype == kind and a.flags.c_contiguous:
        return a
    with np.errstate(over="ignore"):  # what overflows float32 is infinite, and refused as such
        return np.ascontiguousarray(a, kind)


def _describe(spec: Mapping[str, Any]) -> str:
    shape = ",".join(map(str, spec["shape"]))
    return f"'{spec['name']}' is {spec['dtype']}[{shape}] (B rows; Bc is B or 1)"


def load(
    path: str | Path,
    provider: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Engine:
    """Open a bundle for running; checks schema, hashes, versions and the provider.

    `progress` hears what takes long: weights on their way to a GPU.
    """
    if not isinstance(path, str | Path):
        what = f"the path of a bundle is {type(path).__name__}"
        raise PccError("B210", what, hint="a str or a Path")
    return Engine(Path(path), provider, threads, progress)
