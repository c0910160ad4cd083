"""The verifier's law of the next m tokens in float64, with its settings applied by definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def adjusted(p: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Temper, keep the top_k largest, then the nucleus: prefix with mass <= top_p, plus one."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    order = sorted(range(len(p)), key=lambda j: (-p[j], j))
    kept = order[:top_k] if top_k else order
    if top_p < 1:
        total, mass, few = p[kept].sum(), 0.0, []
        for j in kept:
            few.append(j)
            mass += p[j] / total
            if mass > top_p:
                break
        kept = few
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


Law = Callable[[list[int]], np.ndarray]  # tokens so far -> next-token law in float64


def law(next_law: Law, prompt: list[int], m: int, settings: dict[str, float]) -> dict:
    """Return the probability of every continuation of m tokens."""
    how = (settings["temperature"], int(settings["top_k"]), settings["top_p"])
    out: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(m):
        longer = {}
        for tokens, weight in out.items():
            p = adjusted(next_law(prompt + list(tokens)), *how)
            longer.update({(*tokens, x): weight * p[x] for x in range(len(p))})
        out = longer
    return out
