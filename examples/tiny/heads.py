"""q(x_1..x_n | e) = sum_z w[z] prod_children m_child[z], with m_leaf[z] = softmax(W[i, z] e)[x_i].

The three heads as one recursion, in plain numpy: FF (r = 1), CP (one sum over all n leaves) and
BTree (sums over pairs, level by level). Written for training: value, exact gradients, greedy draft.
Sum weights are softmax(S[f, k] e) over their last axis; a level of arity a turns F a children into
F nodes: m[f, k] = sum_z w[f, k, z] prod_a m[f a + a', z].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[np.floating]
Ids = npt.NDArray[np.integer]

EMISSION = "mt_head._categorical_log_probs_heads.0.head.proj"
SUM = "mt_head._sum_weights_heads.{}.head.proj"
CIRCUIT_NAMES = {"ff": "fully_factorized", "cp": "cp", "btree": "btree"}


@dataclass
class Head:
    """theta = (W [n, r, V, D], S_k [F, Ko, Ki, D] per level): kind is ff, cp or btree."""

    kind: str
    emission: Array
    sums: list[Array]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, r, vocab, dim = self.emission.shape
        return n, r, vocab, dim

    @property
    def name(self) -> str:
        n, r, _, _ = self.shape
        return f"{self.kind}-n-{n}-r-{r}"

    @property
    def params(self) -> list[Array]:
        return [self.emission, *self.sums]

    @property
    def arities(self) -> list[int]:
        """Children per node, bottom level first: (n) for FF and CP, (2, 2, ..) for BTree."""
        n = self.shape[0]
        return [2] * (n.bit_length() - 1) if self.kind == "btree" else [n]


def create(
    kind: str, base: Array, r: int, rng: np.random.Generator, noise: float = 0.3, sums: float = 0.3
) -> Head:
    """W[i, z] = base[i] + noise sd(base) N(0, 1); S ~ sums N(0, 1): equal components never part."""
    n, dim = base.shape[0], base.shape[-1]
    if kind == "ff":
        return Head(kind, base[:, :1].copy(), [])
    wide = np.repeat(base[:, :1], r, axis=1)
    wide = wide + (noise * base.std() * rng.standard_normal(wide.shape)).astype(base.dtype)
    folds = [n // 2**level for level in range(1, n.bit_length())] if kind == "btree" else [1]
    shapes = [(f, 1 if f == 1 else r, r, dim) for f in folds]
    return Head(kind, wide, [(sums * rng.standard_normal(s)).astype(base.dtype) for s in shapes])


def discounts(n: int, gamma: float) -> Array:
    """sum_i gamma^(i-1) log q(x_i | x_<i) = sum_p c_p log q(x_1..x_p): the c_p."""
    powers: Array = gamma ** np.arange(n)
    powers[:-1] -= powers[1:]
    return powers


def softmax(logits: Array) -> Array:
    """exp(l - max l) / sum exp(l - max l), last axis."""
    cells: Array = np.exp(logits - logits.max(-1, keepdims=True))
    cells /= cells.sum(-1, keepdims=True)
    return cells


def sum_weights(head: Head, e: Array) -> list[Array]:
    """W_k = softmax(S_k e) over Ki, one [B, F, Ko, Ki] per level; for FF the constant 1."""
    if not head.sums:
        return [np.ones((len(e), 1, 1, 1), e.dtype)]
    flat = [(e @ s.reshape(-1, s.shape[-1]).T).reshape(-1, *s.shape[:3]) for s in head.sums]
    return [softmax(logits) for logits in flat]


def _emissions(head: Head, e: Array) -> tuple[Array, Array]:
    """E = exp(l - max l) and its sum over V, for l = W e: [B, n, r, V] and [B, n, r, 1]."""
    n, r, vocab, dim = head.shape
    cells = (e @ head.emission.reshape(-1, dim).T).reshape(-1, n, r, vocab)
    cells -= cells.max(-1, keepdims=True)
    np.exp(cells, out=cells)
    return cells, cells.sum(-1, keepdims=True)


def prefixes(
    head: Head, weights: list[Array], leaf: Array
) -> tuple[Array, list[tuple[Array, Array]]]:
    """L_p = log q(x_1..x_p), [B, n]: leaves after p read 1; also (exp, sum) of each level."""
    n = leaf.shape[1]
    seen = np.triu(np.ones((n, n), leaf.dtype))[..., None]
    m = leaf[:, :, None] * seen
    kept = []
    for arity, w in zip(head.arities, weights, strict=True):
        batch, nodes, p, r = m.shape
        u = m.reshape(batch, nodes // arity, arity, p, r).sum(2)
        top = u.max(-1, keepdims=True)
        ex = np.exp(u - top)
        s = ex @ w.swapaxes(-1, -2)
        kept.append((ex, s))
        m = top + np.log(s)
    return m[:, 0, :, 0], kept


def downward(
    head: Head, weights: list[Array], kept: list[tuple[Array, Array]], b: Array
) -> tuple[Array, list[Array]]:
    """R[k, z] = b[k] w[k, z] u[z] / m[k], b_child[z] = sum_k R[k, z]: leaf b, sum_p R per level."""
    flows: list[Array] = []
    for arity, w, (ex, s) in zip(
        reversed(head.arities), reversed(weights), reversed(kept), strict=True
    ):
        q = b / s
        flows.append(w * (q.swapaxes(-1, -2) @ ex))
        b = np.repeat(ex * (q @ w), arity, axis=1)
    return b, flows[::-1]


def loss(head: Head, e: Array, x: Ids, gamma: float) -> tuple[float, Array, list[Array], Array]:
    """L = -mean_b sum_p c_p log q(x_1..x_p): L, joint log q [B], parameter gradients, dL/de.

    With b the posterior of the state a node receives, summed over prefixes with weight c_p:
    dL/d(W e)[i, z] = b[i, z] (softmax - onehot(x_i)); dL/d(S e)[k] = b[k] w[k] - R[k], with
    R[k, z] = b[k] w[k, z] u[z] / m[k]; and the children's b is sum_k R[k, z].
    """
    n, r, _, dim = head.shape
    batch = len(e)
    cells, norm = _emissions(head, e)
    spot = np.broadcast_to(x.astype(np.int64)[:, :, None, None], (batch, n, r, 1))
    leaf = (np.log(np.take_along_axis(cells, spot, -1) + 1e-37) - np.log(norm))[..., 0]
    weights = sum_weights(head, e)
    logq, kept = prefixes(head, weights, leaf)
    c = discounts(n, gamma).astype(e.dtype)
    value = -float((logq @ c).mean())

    b, flows = downward(
        head, weights, kept, np.broadcast_to((c / batch)[:, None], (batch, 1, n, 1))
    )
    grads: list[Array] = []
    de = np.zeros_like(e)
    for s, w, flow in zip(head.sums, weights, flows, strict=False):
        g = (w * flow.sum(-1, keepdims=True) - flow).reshape(batch, -1)
        grads.append((g.T @ e).reshape(s.shape))
        de += g @ s.reshape(-1, dim)
    seen = np.triu(np.ones((n, n), e.dtype))[..., None]
    post = (b * seen).sum(2)[..., None]

    cells *= post / norm
    np.put_along_axis(cells, spot, np.take_along_axis(cells, spot, -1) - post, -1)
    flat = cells.reshape(batch, -1)
    grads.insert(0, (flat.T @ e).reshape(head.emission.shape))
    de += flat @ head.emission.reshape(-1, dim)
    return value, logq[:, -1], grads, de


def draft(head: Head, e: Array) -> Ids:
    """(z, x) = argmax prod w prod phi over latents and tokens (max-product): x, [B, n]."""
    r = head.shape[1]
    batch = len(e)
    cells, norm = _emissions(head, e)
    token = cells.argmax(-1)
    m = -np.log(norm[..., 0])
    picks = []
    for arity, w in zip(head.arities, sum_weights(head, e), strict=True):
        u = m.reshape(batch, -1, arity, r).sum(2)
        scores = np.log(w + 1e-37) + u[:, :, None]
        picks.append(scores.argmax(-1))
        m = scores.max(-1)
    state = np.zeros((batch, 1), np.int64)
    for arity, pick in zip(reversed(head.arities), reversed(picks), strict=True):
        chosen = np.take_along_axis(pick, state[..., None], -1)[..., 0]
        state = np.repeat(chosen, arity, axis=1)
    return np.take_along_axis(token, state[..., None], -1)[..., 0]


def greedy(head: Head, e: Array) -> Ids:
    """x_i = argmax_v q(v | x_<i) = argmax_v sum_z b_i[z] phi_{i,z}[v], one byte after another."""
    n, r, _, _ = head.shape
    batch = len(e)
    phi, norm = _emissions(head, e)
    phi /= norm
    weights = sum_weights(head, e)
    leaf = np.zeros((batch, n, r), e.dtype)
    drafted = np.zeros((batch, n), np.int64)
    for i in range(n):
        _, kept = prefixes(head, weights, leaf)
        b, _ = downward(head, weights, kept, np.ones((batch, 1, n, 1), e.dtype))
        drafted[:, i] = (b[:, i, -1, None] @ phi[:, i])[:, 0].argmax(-1)
        chosen = np.take_along_axis(phi[:, i], drafted[:, i, None, None], -1)[..., 0]
        leaf[:, i] = np.log(chosen + 1e-37)
    return drafted


def accepted(drafted: Ids, truth: Ids) -> Ids:
    """max{s : drafted_1..s = truth_1..s} per row."""
    length: Ids = np.cumprod(drafted == truth, axis=1).sum(1)
    return length


def stored(head: Head, gamma: float) -> dict[str, npt.NDArray[Any]]:
    """Tensors as the published code names them; weights in fp16."""
    n = head.shape[0]
    state: dict[str, npt.NDArray[Any]] = {
        "_exp_gamma_weights": (gamma ** np.arange(n)).astype(np.float32),
        "circuit._circuit._nodes.0._scope_idx": np.arange(n, dtype=np.int64)[:, None],
        EMISSION: head.emission.astype(np.float16),
    }
    state |= {SUM.format(k): s.astype(np.float16) for k, s in enumerate(head.sums)}
    if head.kind == "btree":
        for layer, folds in ((1, n // 2), (3, n // 4)):
            key = f"circuit._circuit._address_book._in_fold_idx_{layer}_0"
            state[key] = np.arange(2 * folds, dtype=np.int64).reshape(folds, 2)
        state["circuit._circuit._address_book._in_fold_idx_7_0"] = np.zeros(1, np.int64)
    elif head.kind == "cp":
        state["circuit._circuit._address_book._in_fold_idx_3_0"] = np.zeros(1, np.int64)
    return state


def settings(head: Head, gamma: float) -> dict[str, Any]:
    """config.yaml of a head."""
    n, r, vocab, dim = head.shape
    kind = "btree" if head.kind == "btree" else "cp"
    return {
        "circuit": {
            "name": CIRCUIT_NAMES[head.kind],
            "n_token": n,
            "n_component": r,
            "n_repetition": 1,
            "model": {"kind": kind},
        },
        "data": {"name": "python-standard-library", "vocab_size": vocab},
        "mt_head": {
            "name": "linear-evabyte",
            "hyperparameters": {
                "type": "evabyte",
                "n_embd": dim,
                "transformer_n_layer": 0,
                "expander_type": "linear",
                "expander_n_layer": 1,
                "share_sum_weights": False,
                "contextual_hmm_weights": True,
                "init_hmm_identity": True,
            },
        },
        "adaptor": {"name": "none", "hyperparameters": None},
        "lm": {"name": "tiny-encoder", "n_embd": dim, "model": {"from_huggingface": None}},
        "model": {"name": "mtp", "beta": 0.0, "gamma": gamma},
        "expname": f"tiny-{head.name}",
    }


def save(head: Head, root: Path, step: int, gamma: float) -> Path:
    """config.yaml and model@STEP.safetensors under root/KIND-n-N-r-R; weights in fp16."""
    folder = root / head.name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model@*.safetensors"):
        old.unlink()
    path = folder / f"model@{step}.safetensors"
    save_file(stored(head, gamma), path)
    path.chmod(0o644)
    config = yaml.safe_dump(settings(head, gamma), sort_keys=False)
    (folder / "config.yaml").write_text(config)
    return folder


def load(folder: str | Path) -> Head:
    """Read the head in a folder that save wrote: fp16 on disk, fp32 in memory."""
    folder = Path(folder)
    (file,) = folder.glob("model@*.safetensors")
    state = load_file(file)
    sums = [v for k, v in sorted(state.items()) if k.startswith("mt_head._sum_weights")]
    kind = folder.name.partition("-")[0]
    return Head(kind, state[EMISSION].astype(np.float32), [s.astype(np.float32) for s in sums])
