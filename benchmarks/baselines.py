"""What compiled queries are compared against. Run `python -m benchmarks.baselines` for its times.

(a) The n-row masked strategy, in plain torch
---------------------------------------------
The published MTPC code answers a prefix q(x_1..x_i) by evaluating the *whole* circuit with the
variables after i integrated out (their leaves become log 1 = 0), and all prefixes by a batch of n
such rows; a conditional row q(x_i = . | x_<i) by giving slot i all V values, V more rows. `Masked`
restates that strategy without the library around it: no graph interpreter, no re-checks, no device
copies, fp32 instead of bf16 autocast, and weights broadcast over rows where the published code
repeats them. It is therefore faster than the published code; a ratio against it flatters nobody.

`Masked.draft(carry, u, ...)` answers the question that the compiled `draft` query answers: given
the carry x_1, draw x_2..x_n and return q. The published loop never conditions a draft on a carry,
so that part is ours, done in the cheapest way the strategy allows:

1. log_softmax of the emissions, softmax of the sums (the inputs are logits, as for pcc);
2. one masked evaluation with only x_1 observed, keeping the input of every sum;
3. top-down ancestral sampling from these values: one draw per visited sum unit, then the n-1
   tokens in one batch. (The published sampler draws n * r tokens bottom-up and discards most.)
4. the rows, in one of three forms, `rows=`:
   - "open" (default): n-1 masked rows, leaf i of row i left open. A circuit is linear in a leaf,
     so one upward pass over the n-1 rows and one downward pass (the derivative with respect to
     every leaf) give the weights b_i[z], and q(x_i = v | x_<i) = sum_z b_i[z] p(v | i, z) / sum b_i
     is one small matmul for all V values. Cheaper than anything in the published code, which has
     no derivatives: n-1 full-circuit evaluations and their reverse.
   - "expand": the published residual routine for every position: per position a batch of V full
     evaluations, (n-1) * V rows in all. (The published loop runs it once per round, for the
     rejected position only; all positions is what training and validation ask of it.)
   - False: only the n prefix marginals, the least the published loop needs per round; `q` is then
     (n-1,), the conditional of each drafted token. It answers less than `draft` does.

Logits must be finite: like the published code, the log-sum-exp has no guard for all -inf.

Shapes and fold order of the logits are the published ones: emissions (1, n, r, V) in token order;
sums per layer (1, F, Ko, Ki): ff none; cp one (1, 1, 1, r); hmm n layers, the last transition
first, the initial distribution (1, 1, 1, r) last; btree (n = 2^k) (1, n/2, r, r), (1, n/4, r, r),
.., (1, 1, 1, r).

(b) libcirkit under ONNX Runtime
--------------------------------
`cirkit_export(kind)`: the circuit in libcirkit, folded and optimised, through torch.onnx.export,
as an ONNX Runtime session for the log-likelihood; with its parameters as arrays. libcirkit is
GPL-3.0: only benchmarks and tests may use it, and it is imported when first asked for.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["ff", "cp", "hmm", "btree"]
Rows = Literal["open", "expand", False]
Array = np.ndarray[Any, Any]
KINDS: tuple[Kind, ...] = ("ff", "cp", "hmm", "btree")
CIRKIT_KINDS = ("hmm", "cp", "btree", "btree-cpt")
CIRKIT_VERSION = "0.3.0"


class MissingPackageError(RuntimeError):
    """A baseline needs a package that is not installed."""


def sum_shapes(kind: str, n: int, r: int) -> list[tuple[int, int, int]]:
    """Return (F, Ko, Ki) of every sum layer, in the published order."""
    if kind == "ff":
        return []
    if kind == "cp":
        return [(1, 1, r)]
    if kind == "hmm":
        return [(1, r, r)] * (n - 1) + [(1, 1, r)]
    if kind == "btree":
        if n < 2 or n & (n - 1):
            raise ValueError(f"btree needs n = 2^k, got {n}")
        levels = [n >> k for k in range(1, n.bit_length())]
        return [(f, r if f > 1 else 1, r) for f in levels]
    raise ValueError(f"unknown kind {kind!r}, one of {', '.join(KINDS)}")


def random_logits(
    kind: str, n: int, r: int, vocab: int, seed: int = 0, scale: float = 1.5
) -> tuple[Array, list[Array]]:
    """Return emission logits f32 (1, n, r, V) and sum logits, each f32 (1, F, Ko, Ki)."""
    rng = np.random.default_rng(seed)
    emission = (scale * rng.standard_normal((1, n, r, vocab))).astype(np.float32)
    sums = [
        (scale * rng.standard_normal((1, *shape))).astype(np.float32)
        for shape in sum_shapes(kind, n, r)
    ]
    return emission, sums


@dataclass(frozen=True)
class Params:
    """Normalised parameters: log emissions (n, r, V), linear sum weights, each (F, Ko, Ki)."""

    emission: Tensor
    sums: tuple[Tensor, ...]


@dataclass
class Trace:
    """One upward pass: the root (R,), the input of every sum, the values below every product."""

    root: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    below: list[Tensor] = field(default_factory=list)


def _sum(x: Tensor, w: Tensor) -> Tensor:
    """Return log(exp(x) @ w^T): x (F, R, Ki) in logs, w (F, Ko, Ki) linear."""
    m = x.amax(-1, keepdim=True)
    return torch.log(torch.bmm(torch.exp(x - m), w.mT)) + m


def _draw(mass: Tensor, u: Tensor) -> Tensor:
    """Return per row the first index whose cumulative mass exceeds u times the total."""
    cum = mass.cumsum(-1)
    index = torch.searchsorted(cum, (u * cum[..., -1])[..., None], right=True)[..., 0]
    return index.clamp_(max=mass.shape[-1] - 1)


class Masked:
    """The n-row masked strategy for one circuit shape (see the module's text)."""

    def __init__(self, kind: str, n: int, r: int, vocab: int) -> None:
        if kind == "ff" and r != 1:
            raise ValueError("ff has r = 1")
        self.kind, self.n, self.r, self.vocab = kind, n, r, vocab
        self.shapes = sum_shapes(kind, n, r)
        self.latents = sum(f for f, _, _ in self.shapes)
        self.tokens = torch.arange(n)
        self.until = torch.ones(n, n, dtype=torch.bool).tril()  # row i observes 0..i
        self.nothing = torch.zeros(n - 1, dtype=torch.int64)

    @property
    def uniforms(self) -> int:
        """How many uniforms `draft` takes: the latents in sampling order, then n-1 tokens."""
        return self.latents + self.n - 1

    def normalise(self, emission_logits: Tensor, sum_logits: Sequence[Tensor]) -> Params:
        """Apply the softmaxes; the batch axis is 1."""
        emission = torch.log_softmax(emission_logits[0], -1)
        return Params(emission, tuple(torch.softmax(s[0], -1) for s in sum_logits))

    def leaves(self, p: Params, x: Tensor, observed: Tensor) -> Tensor:
        """Return (n, R, r): log emissions of x (R, n), 0 where not observed (R, n)."""
        values = p.emission[self.tokens[:, None], :, x.T]
        return values * observed.T[..., None]

    def up(self, p: Params, leaf: Tensor) -> Trace:
        """Evaluate the circuit on R rows at once; leaf (n, R, r)."""
        t = Trace(leaf)
        if self.kind == "ff":
            t.root = leaf.sum(0)[:, 0]
            return t
        if self.kind == "cp":
            t.inputs.append(leaf.sum(0, keepdim=True))
            t.root = _sum(t.inputs[0], p.sums[0])[0, :, 0]
            return t
        if self.kind == "hmm":
            value = leaf[-1:]
            for k, w in enumerate(p.sums):
                t.inputs.append(value)
                value = _sum(value, w)
                if k < self.n - 1:
                    t.below.append(value)
                    value = value + leaf[self.n - 2 - k]
            t.root = value[0, :, 0]
            return t
        value = leaf
        for w in p.sums:
            t.below.append(value)
            t.inputs.append(value[0::2] + value[1::2])
            value = _sum(t.inputs[-1], w)
        t.root = value[0, :, 0]
        return t

    def down(self, p: Params, leaf: Tensor, t: Trace, which: Tensor) -> Tensor:
        """Return log d root[j] / d leaf[which[j], j, :] for every row j, (R, r)."""
        rows = torch.arange(leaf.shape[1])
        if self.kind == "ff":
            return leaf.sum(0) - leaf[which, rows]
        top = torch.log(p.sums[-1])  # (1, 1, r)
        if self.kind == "cp":
            return top[0] + t.inputs[0][0] - leaf[which, rows]
        if self.kind == "hmm":
            above = [top.expand(1, leaf.shape[1], self.r)]
            for i in range(1, self.n):
                above.append(_sum(above[-1] + leaf[i - 1], p.sums[self.n - 1 - i].mT))
            message = [*reversed(t.below), torch.zeros_like(t.below[0])]
            return torch.cat(above)[which, rows] + torch.cat(message)[which, rows]
        slope = top.expand(1, leaf.shape[1], self.r)
        for k in reversed(range(len(p.sums))):
            if k < len(p.sums) - 1:
                slope = _sum(slope, p.sums[k].mT)
            left, right = t.below[k][0::2], t.below[k][1::2]
            slope = torch.stack((slope + right, slope + left), 1).flatten(0, 1)
        return slope[which, rows]

    def descend(self, p: Params, t: Trace, u: Tensor) -> Tensor:
        """Draw the latent that each token's emission takes, (n,), from a one-row trace."""
        n = self.n
        if self.kind == "ff":
            return torch.zeros(n, dtype=torch.int64)
        masses = [torch.exp(v[:, 0] - v[:, 0].amax(-1, keepdim=True)) for v in t.inputs]
        if self.kind == "cp":
            return _draw(p.sums[0][:, 0] * masses[0], u[:1]).expand(n)
        if self.kind == "hmm":
            states = [_draw(p.sums[-1][:, 0] * masses[-1], u[:1])]
            for i in range(1, n):
                row = p.sums[n - 1 - i][0].index_select(0, states[-1])
                states.append(_draw(row * masses[n - 1 - i], u[i : i + 1]))
            return torch.cat(states)
        state, used = torch.zeros(1, dtype=torch.int64), 0
        for w, mass in zip(reversed(p.sums), reversed(masses), strict=True):
            folds = w.shape[0]
            state = _draw(w[self.tokens[:folds], state] * mass, u[used : used + folds])
            state, used = state.repeat_interleave(2), used + folds
        return state

    def prefix(self, p: Params, x: Tensor) -> Tensor:
        """Return log q(x_1..x_i) for i = 1..n, (n,), from n masked rows."""
        rows = x.expand(self.n, self.n)
        return self.up(p, self.leaves(p, rows, self.until)).root

    def loglik(self, p: Params, x: Tensor) -> Tensor:
        """Return log q(x) of each row, (R,)."""
        return self.up(p, self.leaves(p, x, torch.ones_like(x, dtype=torch.bool))).root

    def open_rows(self, p: Params, x: Tensor) -> Tensor:
        """Return q(x_i = v | x_<i) for i = 2..n, (n-1, V), from n-1 rows with an open leaf."""
        leaf = self.leaves(p, x.expand(self.n - 1, self.n), self.until[:-1])
        trace = self.up(p, leaf)
        weight = torch.softmax(self.down(p, leaf, trace, self.tokens[1:]), -1)
        return torch.bmm(weight[:, None], torch.exp(p.emission[1:]))[:, 0]

    def expand_rows(self, p: Params, x: Tensor) -> Tensor:
        """Return the same rows from V full evaluations per position, (n-1) * V in all."""
        values = torch.arange(self.vocab)
        out = []
        for i in range(1, self.n):
            rows = x.repeat(self.vocab, 1)
            rows[:, i] = values
            root = self.up(p, self.leaves(p, rows, self.until[i].expand(self.vocab, self.n))).root
            out.append(torch.softmax(root, -1))
        return torch.stack(out)

    @torch.no_grad()
    def conditionals(
        self,
        x: Tensor,
        emission_logits: Tensor,
        sum_logits: Sequence[Tensor],
        rows: Rows = "open",
    ) -> Tensor:
        """Return the q of `draft` for given tokens x (n,), carry included: for parity checks."""
        return self._rows(self.normalise(emission_logits, sum_logits), x, rows)

    def _rows(self, p: Params, x: Tensor, rows: Rows) -> Tensor:
        if rows == "open":
            return self.open_rows(p, x)
        if rows == "expand":
            return self.expand_rows(p, x)
        log_prefix = self.prefix(p, x)
        return torch.exp(log_prefix[1:] - log_prefix[:-1])

    @torch.no_grad()
    def draft(
        self,
        carry: Tensor,
        u: Tensor,
        emission_logits: Tensor,
        sum_logits: Sequence[Tensor],
        rows: Rows = "open",
    ) -> tuple[Tensor, Tensor]:
        """Draw x_2..x_n given x_1 = carry and return them, (n-1,), with q.

        carry i64 (1,); u f32 (1, `uniforms`); q is (n-1, V), or (n-1,) with rows=False.
        """
        p = self.normalise(emission_logits, sum_logits)
        x = torch.cat((carry, self.nothing))
        trace = self.up(p, self.leaves(p, x[None], self.until[:1]))
        state = self.descend(p, trace, u[0])
        mass = torch.exp(p.emission[self.tokens[1:], state[1:]])
        x = torch.cat((carry, _draw(mass, u[0, self.latents :])))
        return x[1:], self._rows(p, x, rows)


@dataclass(frozen=True)
class CirkitCase:
    """A libcirkit circuit as an ONNX Runtime session, and the circuit as arrays.

    `emission` (n, r, V) are probabilities; `sums` are probabilities (F, Ko, Ki) in the published
    order of the kind, except that "btree" has cp layers: a sum (n, r, r) on every leaf comes first.
    Both are float64 softmaxes of the logits that libcirkit holds in fp32.
    """

    kind: str
    session: Any
    input_name: str
    emission: Array
    sums: list[Array]
    emission_logits: Array
    sum_logits: list[Array]

    def run(self, x: Array) -> Array:
        """Return log p(x) f32 (B,) of x i64 (B, n)."""
        return np.asarray(self.session.run(None, {self.input_name: x})[0]).reshape(-1)

    def reference(self, x: Array) -> Array:
        """Return log p(x) in float64, linear space, from the arrays: what both sides must match."""
        n = self.emission.shape[0]
        leaf = np.stack([self.emission[i][:, x[:, i]].T for i in range(n)])
        if self.kind == "cp":
            return np.asarray(np.log(leaf.prod(0) @ self.sums[0][0].T)[:, 0])
        if self.kind == "hmm":
            value = leaf[n - 1]
            for k in range(n - 1):
                value = leaf[n - 2 - k] * (value @ self.sums[k][0].T)
            return np.asarray(np.log(value @ self.sums[n - 1][0].T)[:, 0])
        rest = list(self.sums)
        if self.kind == "btree":
            leaf = leaf @ rest.pop(0).transpose(0, 2, 1)
        for w in rest:
            leaf = (leaf[0::2] * leaf[1::2]) @ w.transpose(0, 2, 1)
        return np.asarray(np.log(leaf[0])[:, 0])


def cirkit_shapes(kind: str, n: int, r: int) -> list[tuple[int, int, int]]:
    """Return (F, Ko, Ki) of every sum layer of `cirkit_export(kind)`."""
    if kind not in CIRKIT_KINDS:
        raise ValueError(f"unknown kind {kind!r}, one of {', '.join(CIRKIT_KINDS)}")
    if kind == "btree":
        return [(n, r, r), *sum_shapes("btree", n, r)]
    return sum_shapes(kind.removesuffix("-cpt"), n, r)


def _softmax(a: Array) -> Array:
    e = np.exp(a.astype(np.float64) - a.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def cirkit_export(
    kind: str,
    *,
    n: int = 8,
    vocab: int = 256,
    units: int = 32,
    seed: int = 0,
    threads: int = 1,
    fold: bool = True,
    dynamo: bool = False,
) -> CirkitCase:
    """Build a circuit in libcirkit, compile it folded and optimised, export it, open it.

    Kinds: "hmm" (the graph of cirkit.templates.pgms.hmm), "cp" (a mixture of factorised
    distributions), "btree" (balanced tree over 0..n-1 with cp layers, a sum on every region) and
    "btree-cpt" (the same tree with cp-t layers, the published MTPC form). Parameters are softmaxes
    of standard normal logits; ONNX Runtime folds these softmaxes when it opens the session. Both
    exporters of torch work; `dynamo=False` is the one without a need for onnxscript.
    Raises `MissingPackageError` where libcirkit is not installed.
    """
    try:
        from cirkit.pipeline import PipelineContext
    except ImportError as e:
        raise MissingPackageError(
            f"libcirkit is not installed ({e}): pip install 'libcirkit=={CIRKIT_VERSION}'"
        ) from None
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackageError("onnxruntime is not installed: pip install onnxruntime") from None
    rng = np.random.default_rng(seed)
    emission = rng.standard_normal((n, units, vocab)).astype(np.float32)
    shapes = cirkit_shapes(kind, n, units)
    sums = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    symbolic = _cirkit_circuit(kind, emission, sums)
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=fold, optimize=True)
    circuit = context.compile(symbolic).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.randint(0, vocab, (2, n))
        file: Any = io.BytesIO()
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["log_prob"]}
        if dynamo:
            shape = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(
                circuit, (example,), dynamo=True, dynamic_shapes=shape, verbose=False, **names
            )
            assert program is not None
            file.write(program.model_proto.SerializeToString())
        else:
            axes = {"x": {0: "batch"}, "log_prob": {0: "batch"}}
            torch.onnx.export(
                circuit, (example,), file, dynamo=False, opset_version=18, dynamic_axes=axes,
                **names,
            )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    return CirkitCase(
        kind, session, session.get_inputs()[0].name,
        _softmax(emission), [_softmax(s) for s in sums], emission, sums,
    )  # fmt: skip


def _cirkit_circuit(kind: str, emission: Array, sums: Sequence[Array]) -> Any:
    """Build the symbolic circuit with given logits, layer by layer as libcirkit's templates do."""
    from cirkit.symbolic.circuit import Circuit
    from cirkit.symbolic.initializers import ConstantTensorInitializer
    from cirkit.symbolic.layers import CategoricalLayer, HadamardLayer, SumLayer
    from cirkit.symbolic.parameters import Parameter, SoftmaxParameter, TensorParameter
    from cirkit.utils.scope import Scope

    n, units, vocab = emission.shape
    layers: list[Any] = []
    inputs: dict[Any, list[Any]] = {}

    def parameter(logits: Array) -> Any:
        tensor = TensorParameter(*logits.shape, initializer=ConstantTensorInitializer(logits))
        return Parameter.from_unary(SoftmaxParameter(logits.shape), tensor)

    def put(layer: Any, *children: Any) -> Any:
        layers.append(layer)
        if children:
            inputs[layer] = list(children)
        return layer

    def leaf(i: int) -> Any:
        probs = parameter(emission[i])
        return put(CategoricalLayer(Scope([i]), units, num_categories=vocab, probs=probs))

    def add(child: Any, logits: Array) -> Any:
        return put(SumLayer(units, logits.shape[0], weight=parameter(logits)), child)

    def times(*children: Any) -> Any:
        return put(HadamardLayer(units, arity=len(children)), *children)

    if kind == "cp":
        top = add(times(*[leaf(i) for i in range(n)]), sums[0][0])
    elif kind == "hmm":
        top = add(leaf(n - 1), sums[0][0])
        for k in range(1, n):
            top = add(times(top, leaf(n - 1 - k)), sums[k][0])
    else:
        rest = list(sums)
        level = [leaf(i) for i in range(n)]
        if kind == "btree":
            first = rest.pop(0)
            level = [add(child, w) for child, w in zip(level, first, strict=True)]
        for fold in rest:
            level = [add(times(level[2 * f], level[2 * f + 1]), w) for f, w in enumerate(fold)]
        (top,) = level
    return Circuit(layers, inputs, [top])


def main() -> None:
    """Print the times of the baselines alone."""
    import argparse

    from benchmarks.timing import Call, environment, interleaved

    parser = argparse.ArgumentParser(description="Times of the baselines, without pcc.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--skip-cirkit", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 0.3 if options.quick else 2.0
    env = environment(1)
    print(f"{env['processor']}, 1 thread, {env['versions']}")
    print(f"\n{'(a) masked draft, V=320':28}{'open':>20}{'expand':>20}{'prefix only':>20}")
    for n in (8, 16):
        for kind in KINDS:
            r = 1 if kind == "ff" else 32
            emission, sums = random_logits(kind, n, r, 320)
            masked = Masked(kind, n, r, 320)
            e, s = torch.from_numpy(emission), [torch.from_numpy(a) for a in sums]
            u, carry = torch.rand(1, masked.uniforms), torch.tensor([7])
            forms: tuple[Rows, ...] = ("open", "expand", False)

            def call(rows: Rows, draft: Any = masked.draft, args: Any = (carry, u, e, s)) -> Call:
                return lambda: draft(*args, rows=rows)

            times = interleaved({str(f): call(f) for f in forms}, seconds)
            cells = "".join(
                f"{f'{t.median:.0f} ({t.p10:.0f}-{t.p90:.0f})':>20}" for t in times.values()
            )
            print(f"{f'{kind} n={n} r={r}':28}{cells}")
    if options.skip_cirkit:
        return
    print(
        f"\n{'(b) libcirkit, ORT, loglik':28}" + "".join(f"{f'B={b}':>20}" for b in (1, 64, 1024))
    )
    for kind_b in CIRKIT_KINDS:
        try:
            case = cirkit_export(kind_b)
        except MissingPackageError as e:
            print(f"not installed: {e}")
            return
        cells, worst = "", 0.0
        for batch in (1, 64, 1024):
            x = np.random.default_rng(1).integers(0, 256, (batch, 8))
            worst = max(worst, float(np.abs(case.run(x) - case.reference(x)).max()))
            if worst > 1e-4:
                raise SystemExit(f"{kind_b}: differs from the reference by {worst:.2e}")
            t = interleaved({"b": lambda c=case, x=x: c.run(x)}, seconds)["b"]  # type: ignore[misc]
            cells += f"{f'{t.median:.0f} ({t.p10:.0f}-{t.p90:.0f})':>20}"
        print(f"{kind_b:28}{cells}   max error {worst:.1e}")
    print("\nmicroseconds per call: median (p10-p90)")


if __name__ == "__main__":
    main()
