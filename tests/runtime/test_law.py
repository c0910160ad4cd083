"""A large sample through sessions follows the verifier's law: Pearson's chi-square.

The first tokens after one prompt, over many streams, against the law that the verifier's equations
give in float64 numpy. A fixed seed: the test either holds or does not. With the likeliest
token's probability moved by 1 % (at full size), or one row of the output matrix scaled by as much,
the same sample must be rejected.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import byte_models
import engines
import numpy as np
import pytest
from goodness import p_value

import pcc
from pcc.frontends import templates
from pcc.runtime.session import Session

Values = np.ndarray[Any, Any]
Record = Callable[[str, object], None]
Law = Callable[[tuple[int, ...]], Values]  # of the next token, after the prompt and these ids
V, N, M, PROMPT = 5, 3, 4, [1, 4, 0]
SMALL = (6_000, 1, 0.25)  # streams, seeds, what is moved
CASES = {
    "hmm": ((50_000, 20, 0.01), "full", {}),
    "cp": ((50_000, 4, 0.03), "full", {"temperature": 0.8, "top_k": 4, "draft_temperature": 1.3}),
    "btree": ((50_000, 4, 0.03), "latent-first", {"top_p": 0.9, "draft_top_p": 0.7}),
}  # fmt: skip


def folder(path: Path) -> Path:
    """A Llama of one layer over V ids, no bytes."""
    tensors = engines.decoder_tensors(V, 1.0, 3)
    tensors = {k: v for k, v in tensors.items() if ".layers.1." not in k}
    config = engines.settings(V, bos_token_id=None, byte_offset=None, num_hidden_layers=1)
    return engines.write_folder(path, config, tensors)


def law_of(
    path: Path, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, *,
    scaled: float = 0.0, **_: Any,
) -> Law:  # fmt: skip
    """The verifier's next-token law in float64, from its equations, truncated as documented.

    `scaled`: by how much one row of the output matrix is wrong.
    """
    config, w = byte_models.read_folder(path)
    # The reference adds a row of a table of subwords; an empty dictionary makes that row zero.
    config |= {"expand_input_ids_dict": [{}, []], "expand_input_ids_maxlen": 1}
    w["model.expand_embed_tokens.weight"] = np.zeros((1, engines.WIDTH))
    w["lm_head.weight"][1] *= 1 + scaled

    @functools.cache
    def law(prefix: tuple[int, ...]) -> Values:
        logits = byte_models.features(config, w, np.array([*PROMPT, *prefix]))[1][-1]
        p = byte_models.softmax(logits / temperature)
        order = np.argsort(-p, kind="stable")
        kept = order[: top_k or V]
        before = np.cumsum(p[kept] / p[kept].sum()) - p[kept] / p[kept].sum()
        kept = kept[: max(1, int((before <= top_p).sum()))] if top_p < 1 else kept
        out = np.zeros(V)
        out[kept] = p[kept] / p[kept].sum()
        return out

    return law


def joint(law: Law, moved: float = 0.0) -> Values:
    """The law of the first M tokens; `moved` raises the likeliest token's share, at each prefix."""
    out = np.zeros((V,) * M)
    for prefix in itertools.product(range(V), repeat=M - 1):
        mass = 1.0
        for i in range(M):
            p = law(prefix[:i])
            p = np.where(p == p.max(), p * (1 + moved), p)
            p = p / p.sum()
            mass = mass * (p[prefix[i]] if i < M - 1 else 1.0)
        out[prefix] = mass * p
    return out


def least(counts: Values, law: Values) -> float:
    """The smallest p-value over the first 1, 2, .. M tokens, times M (Bonferroni)."""
    later = [tuple(range(m, M)) for m in range(1, M + 1)]
    return min(1.0, M * min(p_value(counts.sum(axis=a), law.sum(axis=a)) for a in later))


def sample(
    engine: Any, streams: int, seeds: Iterable[int], **options: Any
) -> tuple[Values, Values]:
    """Counts of the first M tokens, and of accepted drafts, over streams and seeds."""
    counts, accepted = np.zeros((V,) * M, np.int64), np.zeros(N, np.int64)
    for seed in seeds:
        session = Session(engine, seed=seed, **options)
        ids = np.array(session.generate_ids([PROMPT] * streams, M))
        np.add.at(counts, tuple(ids.T), 1)
        accepted += session.stats["acceptance_length_histogram"]
    return counts, accepted


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CASES)
def test_the_law_of_a_large_sample(
    kind: str, full: bool, tmp_path: Path, record_property: Record
) -> None:
    large, proposal, options = CASES[kind]
    streams, seeds, moved = large if full else SMALL
    source = folder(tmp_path / "model")
    head = getattr(templates, kind)(N, 2, V, context=engines.WIDTH, seed=5)
    made = pcc.compile(
        head, verifier=source, out=tmp_path / "m.pcc", max_seq=16, chunk=2, queries=["draft"],
        proposal=proposal, validate=False,
    )  # fmt: skip
    engine = pcc.load(made.path, threads=2 if seeds > 1 else 1)
    counts, accepted = sample(engine, streams, range(seeds), **options)
    law = law_of(source, **options)
    other = law_of(source, **options, scaled=moved)
    right, wrong, scaled = (least(counts, x) for x in (joint(law), joint(law, moved), joint(other)))
    for name, value in (
        ("draws", int(counts.sum())), ("p", right), ("p_moved", wrong),
        ("p_scaled", scaled), ("moved", moved),
        ("accepted", str(accepted.tolist())),
    ):  # fmt: skip
        record_property(name, value)
    assert counts.sum() == streams * seeds
    assert not counts[joint(law) == 0].any()
    assert accepted.min() > 0.02 * accepted.sum()  # drafts are accepted and rejected
    assert right > 1e-3
    assert wrong < 1e-3
    assert scaled < 1e-3
