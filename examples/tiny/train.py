"""min over (encoder, heads) of -sum_i gamma^(i-1) log q(x_{t+i} | x_{t+1..t+i-1}, e_t).

Trains the tiny model set on a CPU, with numpy only: the encoder with an FF head first, then FF, CP
and BTree heads together on the one encoder. Adam, cosine decay, fixed seeds.

    python examples/tiny/train.py            # about six minutes on two slow cores
    python examples/tiny/train.py --check    # gradients against finite differences, seconds
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

import corpus
import encoder as enc
import heads

Array = npt.NDArray[np.floating]
HERE = Path(__file__).resolve().parent


class Adam:
    """p -= lr_t m / (sqrt(v) + eps), m and v bias-corrected running means of g and g^2."""

    def __init__(self, params: list[Array], betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.params = params
        self.betas = betas
        self.first = [np.zeros_like(p) for p in params]
        self.second = [np.zeros_like(p) for p in params]
        self.steps = 0

    def step(self, grads: list[Array], lr: float) -> None:
        self.steps += 1
        b1, b2 = self.betas
        rate = lr * np.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        for p, g, m, v in zip(self.params, grads, self.first, self.second, strict=True):
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            p -= (rate * m / (np.sqrt(v) + 1e-8)).astype(p.dtype)


def schedule(step: int, steps: int, lr: float, warm: int = 100) -> float:
    """Rate = lr min(1, step / warm) (0.02 + 0.98 cos^2(pi step / 2 steps))."""
    decay = np.cos(0.5 * np.pi * step / steps) ** 2
    return float(lr * min(1.0, (step + 1) / warm) * (0.02 + 0.98 * decay))


def gradients(
    model: enc.Encoder, all_heads: list[heads.Head], ids: corpus.Ids, x: corpus.Ids, gamma: float
) -> tuple[list[float], list[Array]]:
    """L = sum_h L_h / H through the encoder: (joint NLL per byte of each head, gradients)."""
    states = model.forward(ids)
    de = np.zeros_like(states[3])
    values, grads = [], []
    for head in all_heads:
        _, logq, g, d = heads.loss(head, states[3], x, gamma)
        values.append(-float(logq.mean()) / x.shape[1])
        grads += g
        de += d / len(all_heads)
    back = model.backward(ids, states, de)
    return values, [back[name] for name in enc.NAMES] + grads


def fit(
    model: enc.Encoder,
    all_heads: list[heads.Head],
    data: corpus.Corpus,
    rng: np.random.Generator,
    args: argparse.Namespace,
    steps: int,
    lr: float,
) -> None:
    """One phase: `steps` Adam steps on random windows; prints the NLL per byte and time left."""
    n = all_heads[0].shape[0]
    params = [model.weights[name] for name in enc.NAMES] + [p for h in all_heads for p in h.params]
    adam = Adam(params)
    began = time.perf_counter()
    mean: Array = np.zeros(len(all_heads))
    for step in range(steps):
        ids, x = data.batch(rng.integers(len(data.starts), size=args.batch), n)
        values, grads = gradients(model, all_heads, ids, x, args.gamma)
        adam.step(grads, schedule(step, steps, lr))
        keep = min(0.99, step / (step + 1))
        mean = keep * mean + (1 - keep) * np.array(values)
        if (step + 1) % args.report == 0 or step + 1 == steps:
            spent = time.perf_counter() - began
            left = spent / (step + 1) * (steps - step - 1)
            shown = "  ".join(f"{h.kind} {v:.4f}" for h, v in zip(all_heads, mean, strict=True))
            print(f"{step + 1:6d}/{steps}  nats/byte {shown}  {spent:4.0f} s, {left:4.0f} s left")


def evaluate(
    model: enc.Encoder, all_heads: list[heads.Head], data: corpus.Corpus, counts: Array, every: int
) -> dict[str, dict[str, float]]:
    """NLL = -mean log q(x_1..x_n) / n, and mean accepted prefix of two greedy drafts.

    Max-product: argmax over latents and bytes at once. Stepwise: argmax of q(x_i | x_<i) in turn.
    """
    n = all_heads[0].shape[0]
    rows = np.arange(0, len(data.starts), every)
    logp = np.log((counts + 1) / (counts + 1).sum())
    totals = {name: np.zeros(4) for name in ("unigram", *(h.name for h in all_heads))}
    for block in np.array_split(rows, max(1, len(rows) // 512)):
        ids, x = data.batch(block, n)
        e = model.forward(ids)[3]
        constant = heads.accepted(np.full_like(x, counts.argmax()), x)
        totals["unigram"] += _sums(-logp[x].sum(), constant, constant)
        for head in all_heads:
            joint = heads.loss(head, e, x, 1.0)[1]
            mode, step = heads.draft(head, e), heads.greedy(head, e)
            totals[head.name] += _sums(
                -joint.sum(), heads.accepted(mode, x), heads.accepted(step, x)
            )
    return {
        name: {
            "nll_per_byte": round(float(t[0]) / (len(rows) * n), 4),
            "accepted_max_product": round(float(t[1]) / len(rows), 3),
            "accepted_stepwise": round(float(t[2]) / len(rows), 3),
            "first_byte_right_stepwise": round(float(t[3]) / len(rows), 4),
        }
        for name, t in totals.items()
    }


def _sums(nll: float, mode: corpus.Ids, step: corpus.Ids) -> Array:
    return np.array([nll, mode.sum(), step.sum(), (step > 0).sum()], np.float64)


def check(seed: int) -> float:
    """E = max |g - (L(p + h) - L(p - h)) / 2h| / (|g| + 1e-3) over sampled weights, float64."""
    rng = np.random.default_rng(seed)
    model = enc.Encoder.random(rng, 5, 3, (7, 6), np.float64)
    ids, x = rng.integers(enc.VOCAB, size=(6, enc.WINDOW)), rng.integers(enc.VOCAB, size=(6, 8))
    base = rng.standard_normal((8, 1, enc.VOCAB, 5))
    worst = 0.0
    for kind in ("ff", "cp", "btree"):
        head = heads.create(kind, base, 3, rng, 1.0, 1.0)
        params = [model.weights[name] for name in enc.NAMES] + head.params

        def value(head: heads.Head = head) -> float:
            return heads.loss(head, model.forward(ids)[3], x, 0.9)[0]

        grads = gradients(model, [head], ids, x, 0.9)[1]
        for p, g in zip(params, grads, strict=True):
            largest = np.argsort(-abs(g).ravel())[:3]
            for at in (*largest, *rng.integers(p.size, size=4)):
                keep, h = p.flat[at], 1e-5
                p.flat[at] = keep + h
                up = value()
                p.flat[at] = keep - h
                numeric = (up - value()) / (2 * h)
                p.flat[at] = keep
                worst = max(worst, abs(numeric - g.flat[at]) / (abs(g.flat[at]) + 1e-3))
        print(f"{kind:6s} gradients agree to {worst:.1e}")
    return worst


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="finite differences only")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=8, help="n, bytes drafted at once")
    parser.add_argument("--components", type=int, default=4, help="r of CP and BTree")
    parser.add_argument("--dim", type=int, default=32, help="D, width of the context")
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs=2, default=(6000, 10000))
    parser.add_argument("--lr", type=float, nargs=2, default=(3e-3, 3e-3))
    parser.add_argument("--report", type=int, default=500)
    return parser.parse_args()


def trained(
    data: corpus.Corpus, counts: Array, args: argparse.Namespace
) -> tuple[enc.Encoder, list[heads.Head]]:
    """The encoder with an FF head first, from byte frequencies; then all heads on it."""
    rng = np.random.default_rng(args.seed)
    model = enc.Encoder.random(rng, args.dim)
    logp = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)
    start = 0.02 * rng.standard_normal((args.window, 1, enc.VOCAB, args.dim), np.float32)
    model.weights["b3"][0] = 1.0
    start[..., 0] += logp - logp.mean()
    ff = heads.create("ff", start, 1, rng)
    fit(model, [ff], data, rng, args, args.steps[0], args.lr[0])
    kinds = ("ff", "cp", "btree")
    all_heads = [heads.create(kind, ff.emission, args.components, rng) for kind in kinds]
    fit(model, all_heads, data, rng, args, args.steps[1], args.lr[1])
    return model, all_heads


def stored(
    model: enc.Encoder, all_heads: list[heads.Head], args: argparse.Namespace
) -> tuple[enc.Encoder, list[heads.Head]]:
    """What was written in fp16, read again."""
    args.out.mkdir(parents=True, exist_ok=True)
    model.save(args.out)
    folders = [heads.save(head, args.out, sum(args.steps), args.gamma) for head in all_heads]
    return enc.load(args.out), [heads.load(folder) for folder in folders]


def save_excerpts(pieces: dict[str, bytes], counts: Array, path: Path) -> None:
    """Held-out texts and the counts of bytes in what was trained on."""
    np.savez_compressed(
        path,
        names=np.array(list(pieces)),
        lengths=np.array([len(p) for p in pieces.values()], np.int64),
        data=np.frombuffer(b"".join(pieces.values()), np.uint8),
        unigram_counts=counts.astype(np.int64),
    )


def main() -> int:
    """Train, store in fp16, evaluate what was stored."""
    args = arguments()
    if args.check:
        return int(check(args.seed) > 1e-5)
    began = time.perf_counter()
    train_files, held_files = corpus.read()
    data, held = (corpus.build(files, args.window) for files in (train_files, held_files))
    counts = np.bincount(data.stream, minlength=enc.VOCAB).astype(np.float64)
    counts[0] = 0
    print(f"{len(data.names)} files, {len(data.starts)} windows; {len(held.names)} held out")
    model, all_heads = trained(data, counts, args)
    seconds = time.perf_counter() - began
    model, all_heads = stored(model, all_heads, args)
    pieces = corpus.excerpts(held_files, 2200)
    save_excerpts(pieces, counts, args.out / "heldout.npz")
    metrics = {
        "command": "python examples/tiny/train.py",
        "arguments": {k: v for k, v in vars(args).items() if k not in ("check", "out", "report")},
        "seed": args.seed,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "seconds": round(seconds, 1),
        "train": {"files": len(data.names), "windows": len(data.starts), "sha256": data.sha256},
        "heldout": {
            "modules": list(held.names),
            "windows": len(held.starts[::3]),
            "sha256": held.sha256,
            "heads": evaluate(model, all_heads, held, counts, 3),
        },
        "excerpts": {
            "file": "heldout.npz",
            "heads": evaluate(model, all_heads, corpus.build(pieces, args.window), counts, 1),
        },
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["heldout"]["heads"], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
