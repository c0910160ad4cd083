"""Check the masked baseline by enumeration at tiny sizes: `python -m benchmarks.check_baselines`.

The joint is written out from the generative story (which latents, which tokens), in float64 numpy,
without any code of the baseline. With libcirkit installed, its export is checked as well.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import Array, Masked, Rows, random_logits
from benchmarks.cirkit_side import CIRKIT_KINDS, MissingPackageError, cirkit_export, softmax

Logits = tuple[torch.Tensor, list[torch.Tensor]]  # of emissions and sums, as in `baselines`


def enumerate_joint(kind: str, emission_logits: Array, sum_logits: list[Array]) -> Array:
    """Return q(x) as an array of shape (V,) * n by summing over every latent assignment."""
    phi = softmax(emission_logits[0])
    w = [softmax(s[0]) for s in sum_logits]
    n, r, vocab = phi.shape
    joint = np.zeros((vocab,) * n)

    def emit(states: Any) -> Array:
        out = np.ones(())
        for i, z in enumerate(states):
            out = np.multiply.outer(out, phi[i, z])
        return np.asarray(out)

    if kind == "ff":
        return emit([0] * n)
    if kind == "cp":
        return np.asarray(sum(w[0][0, 0, z] * emit([z] * n) for z in range(r)))
    if kind == "hmm":
        for z in itertools.product(range(r), repeat=n):
            mass = w[n - 1][0, 0, z[0]]
            for i in range(1, n):  # the layer of z_{i-1} -> z_i, 0-based, is sum n-1-i
                mass *= w[n - 1 - i][0, z[i - 1], z[i]]
            joint += mass * emit(z)
        return joint
    nodes = [(level, f) for level in reversed(range(len(w))) for f in range(w[level].shape[0])]
    for drawn in itertools.product(range(r), repeat=len(nodes)):
        state_of = dict(zip(nodes, drawn, strict=True))
        mass = 1.0
        for (level, f), state in state_of.items():
            parent = state_of.get((level + 1, f // 2), 0)
            mass *= w[level][f, parent, state]
        joint += mass * emit([state_of[0, i // 2] for i in range(n)])
    return joint


def check_masked(kind: str, n: int, r: int, vocab: int, draws: int) -> None:
    """Compare conditionals, prefixes, log-likelihood and sampling with the enumerated joint."""
    emission, sums = random_logits(kind, n, r, vocab, seed=n + 10 * r)
    joint = enumerate_joint(kind, emission, sums)
    assert abs(joint.sum() - 1) < 1e-12
    logits = torch.from_numpy(emission), [torch.from_numpy(a) for a in sums]
    masked = Masked(kind, n, r, vocab)
    errors = [_error(masked, logits, joint, x) for x in np.ndindex(joint.shape)]
    worst = float(np.max(errors))  # NaN stays NaN, and fails
    assert worst < 5e-6, f"{kind}: differs from enumeration by {worst:.2e}"
    carry = 1
    law = (joint[carry] / joint[carry].sum()).reshape(-1)
    chi2, dof = _chi2(law, _counts(masked, logits, carry, draws))
    sigmas = (chi2 - dof) / np.sqrt(2 * dof)
    assert sigmas < 4, f"{kind}: sampling off, chi2 {chi2:.1f} at {dof} degrees of freedom"
    print(f"{kind:6} n={n} r={r} V={vocab}: max error {worst:.1e}, chi2 {chi2:.1f} / {dof}")


def _error(masked: Masked, logits: Logits, joint: Array, x: tuple[int, ...]) -> float:
    """Return the largest error of conditionals, prefixes and log-likelihood of x i64 (n,)."""
    n, vocab = joint.ndim, joint.shape[0]
    tokens, params = torch.tensor(x), masked.normalise(*logits)
    want = np.empty((n - 1, vocab))
    for i in range(1, n):
        row = joint[x[:i]].reshape(vocab, -1).sum(1)
        want[i - 1] = row / row.sum()
    forms: tuple[tuple[Rows, Array], ...] = (
        ("open", want), ("expand", want), (False, want[np.arange(n - 1), x[1:]]),
    )  # fmt: skip
    gaps = [masked.conditionals(tokens, *logits, rows=form).numpy() - due for form, due in forms]
    log_prefix = [np.log(joint[x[: i + 1]].sum()) for i in range(n)]
    gaps.append(masked.prefix(params, tokens).numpy() - log_prefix)
    gaps.append(masked.loglik(params, tokens[None]).numpy() - np.log(joint[x]))
    return float(np.max([np.abs(g).max() for g in gaps]))


def _counts(masked: Masked, logits: Logits, carry: int, draws: int) -> Array:
    """Return how often each continuation of a carry is drawn, (V^(n-1),), the last fastest."""
    rng = torch.Generator().manual_seed(3)
    counts = np.zeros(masked.vocab ** (masked.n - 1))
    powers = torch.tensor([masked.vocab**k for k in reversed(range(masked.n - 1))])
    for _ in range(draws):
        u = torch.rand(1, masked.uniforms, generator=rng)
        drawn, _q = masked.draft(torch.tensor([carry]), u, *logits, rows=False)
        counts[int((drawn * powers).sum())] += 1
    return counts


def _chi2(law: Array, counts: Array) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom; cells that expect < 5 are one."""
    draws = counts.sum()
    order = np.argsort(-law)
    keep = order[law[order] * draws >= 5]
    seen = np.append(counts[keep], draws - counts[keep].sum())
    due = np.append(law[keep], max(1 - law[keep].sum(), 0)) * draws
    big = due > 1e-9
    return float((((seen - due)[big]) ** 2 / due[big]).sum()), int(big.sum()) - 1


def check_cirkit() -> None:
    """Compare every exported libcirkit circuit with the float64 reference."""
    for kind in CIRKIT_KINDS:
        try:
            case = cirkit_export(kind, vocab=16, units=4)
        except MissingPackageError as e:
            print(f"libcirkit: not installed ({e})")
            return
        x = np.random.default_rng(0).integers(0, 16, (50, 8))
        error = float(np.abs(case.run(x) - case.reference(x)).max())
        assert error < 2e-5, f"libcirkit {kind}: differs by {error:.2e}"
        assert case.run(x[:1]).shape == (1,)
        print(f"libcirkit {kind}: max error {error:.1e}")


def main() -> None:
    """Run all checks; an assertion fails where one does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=4000)
    draws = parser.parse_args().draws
    torch.set_num_threads(1)
    for kind in ("ff", "cp", "hmm", "btree"):
        r = 1 if kind == "ff" else 3
        check_masked(kind, 4, r, 3, draws)
        check_masked(kind, 2, r, 5, draws)
    check_cirkit()


if __name__ == "__main__":
    main()
