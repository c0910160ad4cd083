"""libcirkit under ONNX Runtime: what log-likelihoods are compared with.

`cirkit_export(kind)`: the circuit in libcirkit, folded and optimised, through torch.onnx.export,
as an ONNX Runtime session for the log-likelihood; with its parameters as arrays. libcirkit is
GPL-3.0: only benchmarks and tests may use it, and it is imported when first asked for.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import Array, sum_shapes

CIRKIT_KINDS = ("hmm", "cp", "btree", "btree-cpt")
CIRKIT_VERSION = "0.3.0"


class MissingPackageError(RuntimeError):
    """A baseline needs a package that is not installed."""


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


def softmax(a: Array) -> Array:
    """Return the softmax over the last axis in float64."""
    e = np.exp(a.astype(np.float64) - a.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _required() -> None:
    """Raise `MissingPackageError` where a package of this side is not installed."""
    try:
        import cirkit.pipeline  # noqa: F401
    except ImportError as e:
        raise MissingPackageError(
            f"libcirkit is not installed ({e}): pip install 'libcirkit=={CIRKIT_VERSION}'"
        ) from None
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise MissingPackageError("onnxruntime is not installed: pip install onnxruntime") from None


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
    _required()
    from cirkit.pipeline import PipelineContext

    rng = np.random.default_rng(seed)
    emission = rng.standard_normal((n, units, vocab)).astype(np.float32)
    shapes = cirkit_shapes(kind, n, units)
    sums = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    symbolic = _symbolic(kind, emission, sums)
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=fold, optimize=True)
    circuit = context.compile(symbolic).eval()
    session = _opened(_exported(circuit, n, vocab, dynamo=dynamo), threads)
    return CirkitCase(
        kind, session, session.get_inputs()[0].name,
        softmax(emission), [softmax(s) for s in sums], emission, sums,
    )  # fmt: skip


def _exported(circuit: Any, n: int, vocab: int, *, dynamo: bool) -> bytes:
    """Return the ONNX file of a compiled circuit, for any batch."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.randint(0, vocab, (2, n))
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["log_prob"]}
        if dynamo:
            shape = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(
                circuit, (example,), dynamo=True, dynamic_shapes=shape, verbose=False, **names
            )
            assert program is not None
            return bytes(program.model_proto.SerializeToString())
        file: Any = io.BytesIO()
        axes = {"x": {0: "batch"}, "log_prob": {0: "batch"}}
        torch.onnx.export(
            circuit, (example,), file, dynamo=False, opset_version=18, dynamic_axes=axes, **names
        )
        return bytes(file.getvalue())


def _opened(model: bytes, threads: int) -> Any:
    """Return a session of ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _Layers:
    """The layers of a symbolic circuit with given logits, as libcirkit's templates make them."""

    def __init__(self, emission: Array) -> None:
        self.emission = emission
        self.units = emission.shape[1]
        self.layers: list[Any] = []
        self.inputs: dict[Any, list[Any]] = {}

    def leaf(self, i: int) -> Any:
        """The units of variable i."""
        from cirkit.symbolic.layers import CategoricalLayer
        from cirkit.utils.scope import Scope

        probs, vocab = _probabilities(self.emission[i]), self.emission.shape[2]
        return self._put(
            CategoricalLayer(Scope([i]), self.units, num_categories=vocab, probs=probs)
        )

    def add(self, child: Any, logits: Array) -> Any:
        """A sum over the units of a layer, logits `[Ko,Ki]`."""
        from cirkit.symbolic.layers import SumLayer

        weight = _probabilities(logits)
        return self._put(SumLayer(self.units, logits.shape[0], weight=weight), child)

    def times(self, *children: Any) -> Any:
        """The product of layers, unit by unit."""
        from cirkit.symbolic.layers import HadamardLayer

        return self._put(HadamardLayer(self.units, arity=len(children)), *children)

    def circuit(self, top: Any) -> Any:
        """The circuit of all layers so far."""
        from cirkit.symbolic.circuit import Circuit

        return Circuit(self.layers, self.inputs, [top])

    def _put(self, layer: Any, *children: Any) -> Any:
        self.layers.append(layer)
        if children:
            self.inputs[layer] = list(children)
        return layer


def _probabilities(logits: Array) -> Any:
    """Return the parameter that is the softmax of given logits."""
    from cirkit.symbolic.initializers import ConstantTensorInitializer
    from cirkit.symbolic.parameters import Parameter, SoftmaxParameter, TensorParameter

    tensor = TensorParameter(*logits.shape, initializer=ConstantTensorInitializer(logits))
    return Parameter.from_unary(SoftmaxParameter(logits.shape), tensor)


def _symbolic(kind: str, emission: Array, sums: Sequence[Array]) -> Any:
    """Return the symbolic circuit of a kind with given logits."""
    n, made = emission.shape[0], _Layers(emission)
    leaf, add, times = made.leaf, made.add, made.times
    if kind == "cp":
        return made.circuit(add(times(*[leaf(i) for i in range(n)]), sums[0][0]))
    if kind == "hmm":
        top = add(leaf(n - 1), sums[0][0])
        for k in range(1, n):
            top = add(times(top, leaf(n - 1 - k)), sums[k][0])
        return made.circuit(top)
    rest = list(sums)
    level = [leaf(i) for i in range(n)]
    if kind == "btree":
        first = rest.pop(0)
        level = [add(child, w) for child, w in zip(level, first, strict=True)]
    for fold in rest:
        level = [add(times(level[2 * f], level[2 * f + 1]), w) for f, w in enumerate(fold)]
    (top,) = level
    return made.circuit(top)
