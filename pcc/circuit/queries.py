"""Query ops: questions put to a whole circuit, erased by the compiler.

A `q.query` names a user's query and one of its outputs. `expand-query` turns it into arithmetic
over two primitives where it can: `q.value` (one upward pass) and `q.rows` (all values of every
variable at once); the others are lowered as they are. `pcc.interp.reference` defines each query by
naive evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

from pcc.ir.core import Op, tensor, units
from pcc.ir.types import Tensor, Type
from pcc.tensor.ops import Input


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a query; `V`, `n` stand for the circuit's sizes in shapes."""

    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str, tuple[str, ...]], ...]  # name, dtype, symbolic shape
    finite: bool = False  # needs every variable to be finite


QUERIES: dict[str, Signature] = {
    "loglik": Signature(("x",), (("log_prob", "f32", ()),)),
    "marginal": Signature(("x", "observed"), (("log_prob", "f32", ()),)),
    "conditional": Signature(("x", "observed", "target"), (("log_prob", "f32", ()),)),
    "prefix": Signature(("x",), (("log_cond", "f32", ("n",)),)),
    "conditionals": Signature(("x",), (("log_cond", "f32", ("n", "V")),), finite=True),
    "univariate": Signature(("x", "observed"), (("log_marg", "f32", ("n", "V")),), finite=True),
    "sample": Signature(
        ("u", "x", "observed"), (("x", "x", ("n",)), ("log_prob", "f32", ())), finite=True
    ),
    "mode": Signature(("x", "observed"), (("x", "x", ("n",)), ("log_value", "f32", ()))),
    "draft": Signature(
        ("carry", "u"), (("x", "i64", ("n-1",)), ("q", "f32", ("n-1", "V"))), finite=True
    ),
}

# Questions that the compiler asks, of step graphs; no user's query.
INTERNAL: dict[str, Signature] = {
    "stepwise": Signature(("carry",), (("x", "i64", ("n-1",)),), finite=True),
}
SIGNATURES = {**QUERIES, **INTERNAL}


class QueryOp(Op):
    """A question to the circuit `root`."""

    root: Op

    @property
    def variables(self) -> int:
        """Number of variables of the circuit."""
        return units(self.root).scopes[0].bit_count()


class Query(QueryOp, name="q.query"):
    """Output `output` of query `query`; `inputs` in the order of its signature; V = `card`."""

    inputs: tuple[Op, ...]
    query: str
    output: str
    card: int

    def infer(self) -> Type:
        self.require(self.query in SIGNATURES, "E130", f"unknown query {self.query!r}")
        sig = SIGNATURES[self.query]
        found = [o for o in sig.outputs if o[0] == self.output]
        self.require(bool(found), "E130", f"{self.query!r} has no output {self.output!r}")
        self.require(
            len(self.inputs) == len(sig.inputs), "E130", f"{self.query!r} takes {sig.inputs}"
        )
        sizes = {"n": self.variables, "n-1": self.variables - 1, "V": self.card}
        _, dtype, shape = found[0]
        if dtype == "x":
            dtype = tensor(self.inputs[sig.inputs.index("x")]).dtype
        return Tensor(dtype, tuple(sizes[d] for d in shape), "b")


class Value(QueryOp, name="q.value"):
    """p(x[observed]) linear, unobserved variables summed out: one upward pass. `f32[b|]`."""

    x: Op
    observed: Op

    def infer(self) -> Type:
        return Tensor("f32", (), "b")


class Rows(QueryOp, name="q.rows"):
    """y[i,v] proportional to p(X_i = v, evidence), linear. `f32[b|n,V]`, V = `card`.

    The evidence is x[observed] without variable i, or the prefix x_<i if `prefix`.
    """

    x: Op
    observed: Op
    prefix: bool
    card: int

    def infer(self) -> Type:
        return Tensor("f32", (self.variables, self.card), "b")


def query_inputs(query: str, n: int, slots: int, x_dtype: str) -> dict[str, Input]:
    """Return the inputs of a query by name, beside those of the circuit's parameters."""
    made = {
        "x": Input("x", x_dtype, "b", (n,)),
        "observed": Input("observed", "bool", "b", (n,)),
        "target": Input("target", "bool", "b", (n,)),
        "carry": Input("carry", "i64", "b", ()),
        "u": Input("u", "f32", "b", (slots,)),
    }
    return {name: made[name] for name in SIGNATURES[query].inputs}
