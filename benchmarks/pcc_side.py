"""The only place of the benchmarks that calls pcc: circuits, compilation, runs.

A `Compiled` query can be called in two ways. `run` is `engine.run`: what a user calls, with checks
of every input's shape, dtype and range. `raw` is the ONNX Runtime session alone on the same arrays,
which is how libcirkit's export is run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.baselines import Array
from benchmarks.cirkit_side import CirkitCase

CONTEXT = 16  # width of the context of the templates; with logits as inputs it does not matter


class UnavailableError(RuntimeError):
    """Pcc cannot answer here; the message says why."""


@dataclass
class Compiled:
    """One query of a compiled bundle."""

    query: str
    engine: Any
    folder: Any
    compile_seconds: float
    load_seconds: float

    @property
    def spec(self) -> Mapping[str, Any]:
        """The query's entry of the manifest."""
        return dict(self.engine.queries[self.query])

    @property
    def nodes(self) -> int | None:
        """How many ONNX nodes the graph has, as far as the manifest says."""
        return self.spec.get("nodes")

    def width(self, name: str) -> int:
        """Return the last dimension of an input."""
        return int(next(i for i in self.spec["inputs"] if i["name"] == name)["shape"][-1])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run through `engine.run`."""
        return dict(self.engine.run(self.query, **inputs))

    def raw(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Run the session alone; `inputs` must be complete, contiguous, of the right dtypes."""
        return list(self._session.run(self._outputs, inputs))

    def open(self) -> Compiled:
        """Open the session now, so that timing does not."""
        self._session = self.engine.session_of(self.query)
        self._outputs = [o["onnx"] for o in self.spec["outputs"]]
        return self

    def close(self) -> None:
        """Remove the temporary bundle."""
        with suppress(OSError):
            shutil.rmtree(self.folder)


def _compile(circuit: Any, query: str, threads: int, **options: Any) -> Compiled:
    import pcc

    start = time.perf_counter()
    artifact = pcc.compile(circuit, queries=[query], out=None, **options)
    middle = time.perf_counter()
    engine = pcc.load(artifact.path, threads=threads)
    compiled = Compiled(query, engine, artifact.path.parent, middle - start, 0.0).open()
    compiled.load_seconds = time.perf_counter() - middle
    return compiled


def _guard(what: str, error: Exception) -> UnavailableError:
    lines = str(error).splitlines() or [""]
    return UnavailableError(f"{what}: {type(error).__name__}: {lines[0]}")


def draft(kind: str, n: int, r: int, vocab: int, threads: int) -> Compiled:
    """Compile the `draft` of a contextual template with its logits as inputs."""
    try:
        from pcc import templates

        sizes = {"n": n, "vocab": vocab, "context": CONTEXT}
        if kind != "ff":
            sizes["r"] = r
        circuit = getattr(templates, kind)(**sizes)
        return _compile(circuit, "draft", threads, parameters="logits")
    except Exception as e:
        raise _guard(f"{kind} n={n}", e) from e


def draft_inputs(carry: Array, u: Array, emission: Array, sums: Sequence[Array]) -> dict[str, Any]:
    """Name the inputs of `draft`: carry i64 [1], u f32 [1,K], logits as in `baselines`."""
    named = {f"sum_logits.{k}": s for k, s in enumerate(sums)}
    return {"carry": carry, "u": u, "emission_logits": emission, **named}


def loglik(case: CirkitCase, threads: int) -> Compiled:
    """Compile the `loglik` of the circuit that libcirkit was given, with the same parameters."""
    try:
        return _compile(_trained(case), "loglik", threads)
    except Exception as e:
        raise _guard(case.kind, e) from e


def _trained(case: CirkitCase) -> Any:
    from pcc import templates

    n, r, vocab = case.emission.shape
    if case.kind == "btree":
        return _btree_with_leaf_sums(case)
    make = getattr(templates, case.kind.removesuffix("-cpt"))
    return make(n, r, vocab, weights={"emissions": case.emission, "sums": case.sums})


def _btree_with_leaf_sums(case: CirkitCase) -> Any:
    """Build the tree with cp layers, which no template makes: a sum on every leaf as well."""
    from pcc.circuit import ops as c
    from pcc.circuit.circuit import Circuit
    from pcc.ir.array import Array as Stored
    from pcc.tensor import ops as t

    def const(a: Array) -> Any:
        return t.Const(Stored.of(a.astype(np.float32)))

    n, r, vocab = case.emission.shape
    first, *rest = case.sums
    level: Any = c.Categorical(tuple(range(n)), const(case.emission))
    level, folds = c.Sum(level, const(first)), n
    for w in rest:
        left, right = tuple(range(0, folds, 2)), tuple(range(1, folds, 2))
        product = c.Hadamard((c.Gather(level, left), c.Gather(level, right)))
        level, folds = c.Sum(product, const(w)), folds // 2
    return Circuit(level, (vocab,) * n, f"btree-cp-n{n}-r{r}", "btree", r, ())
