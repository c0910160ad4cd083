"""Generation checked: graphs against the float64 evaluator, text against autoregressive decoding.

The float64 evaluator runs the same tensor modules that the graphs were lowered from, on the states
of a real generation. Greedy text is compared with plain one-token decoding; where the two differ,
the logit gap at the first difference tells a near-tie (an n-wide and a one-wide pass round
differently) from a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pcc import knobs
from pcc.errors import PccError
from pcc.interp.run import run
from pcc.ir.array import dtype_of
from pcc.ir.core import Values, tensor
from pcc.ir.module import Module
from pcc.ir.semiring import Semiring
from pcc.ir.types import HALVES
from pcc.runtime.dtypes import STORED
from pcc.runtime.engine import Engine
from pcc.runtime.measure import compare_greedy
from pcc.runtime.vocabulary import Vocabulary
from pcc.stored import Stages
from pcc.tensor.ops import Const

PROMPT = 24  # tokens of the prompt that checks start from
Findings = list[tuple[str, str, float, float]]  # query, what, error, tolerance


def check_generation(engine: Engine, seed: int, say: Callable[[str], None]) -> Findings:
    """Return what was compared: (graph, what, error, tolerance). Large models are refused."""
    stages = Stages(engine.path, engine.manifest["files"])
    spec = engine.generation()
    rng = np.random.default_rng([seed, 31])
    prompt = _prompt(engine, rng)
    found: Findings = []
    for query in ("verify", "prefill_greedy", "step_greedy", "prefill", "step"):
        say(f"'{query}' in float64")
        module = stages.module(f"tensor-{query}")
        affordable(module, "verifier")
        found += _graph(engine, query, module, prompt, rng)
    say("greedy text against autoregressive decoding")
    count = min(knobs.CHECK_TOKENS, int(spec["max_seq"]) - len(prompt) - 1)
    if (batch := batch_of(engine)) > 1:
        what = f"greedy text is not compared: one-token decoding takes one row, graphs take {batch}"
        found.append(("step_greedy", what, 0.0, 0.0))
    elif count > 1:
        tie = knobs.LOGIT_TIE * knobs.WIDER_TIE[stages.module("tensor-verify").stored]
        compared, _ = compare_greedy(engine, [prompt], count, lambda _: None, tie)
        faults = [d for d in compared.differences if not d["near_tie"]]
        ties = f", {compared.near_ties} near-ties" if compared.near_ties else ""
        what = f"greedy text of {count} tokens is the autoregressive one{ties}"
        found.append(("step_greedy", what, float(bool(faults)), 0.0))
    return found


def batch_of(engine: Engine) -> int:
    """Return the rows of a pass: what static graphs were compiled for, else one."""
    return int(engine.spec_of("step").get("batch", 1))


def _prompt(engine: Engine, rng: np.random.Generator) -> list[int]:
    spec = engine.generation()
    size = max(1, min(PROMPT, int(spec["max_seq"]) // 2))
    v = Vocabulary.of(engine.manifest, int(spec["vocab"]))
    usable = [t for t in range(v.size) if v.byte(t) is not None] or list(range(v.size))
    ids = [int(t) for t in rng.choice(usable, size)]
    return ids if v.bos is None else [v.bos, *ids[1:]]


def affordable(module: Module, what: str) -> None:
    """Refuse what the float64 evaluator cannot take. Errors: V110."""
    total = sum(n.value.size for n in module.nodes() if isinstance(n, Const))
    if total > knobs.CHECK_PARAMETERS:
        raise PccError(
            "V110",
            f"the {what} has {total} numbers, too many for the float64 evaluator",
            hint=f"up to {knobs.CHECK_PARAMETERS} are checked; `pcc bench` compares greedy texts",
        )


def _graph(
    engine: Engine, query: str, module: Module, prompt: list[int], rng: np.random.Generator
) -> Findings:
    """Run a graph and its module on the same inputs: states after a prompt, plausible others."""
    inputs = _inputs(engine, query, prompt, rng)
    spec = engine.queries[query]
    kinds = {io["name"]: io["dtype"] for io in (*spec["inputs"], *spec["outputs"])}
    wide = {k: _numbers(v, kinds[k]) for k, v in inputs.items()}
    values = run(module.roots, wide, Semiring())
    names = [name for name, _ in module.outputs]
    found: Findings = []
    for rows in (1, 2) if spec.get("one_row") else (1,):  # the graph for one row, and for any
        answers = engine.runner.answer(query, inputs, rows)
        made = zip([o["name"] for o in spec["outputs"]], answers, strict=True)
        got = {k: _numbers(v, kinds[k]) for k, v in made}
        want = {k: np.broadcast_to(v, got[k].shape) for k, v in zip(names, values, strict=True)}
        note = " (graph for any number of rows)" if rows > 1 else ""
        batch = batch_of(engine)
        for b in range(batch):
            at = f" (row {b})" if batch > 1 else note
            one = [{k: v[b : b + 1] for k, v in x.items()} for x in (want, got)]
            found += [(q, w + at, e, x) for q, w, e, x in _compared(query, module, *one)]
    return found


def _numbers(value: Values, kind: str) -> Values:
    """Return float64 of any float type; on a device, bf16 is kept as its bits."""
    if kind == "bf16":
        value = value.view(dtype_of(kind))
    return value.astype(np.float64) if kind in ("f32", *HALVES) else value


def _compared(
    query: str, module: Module, want: Mapping[str, Values], got: Mapping[str, Values]
) -> Findings:
    """Compare the outputs of one graph: integers must be equal, unless a near-tie decides them."""
    out: Findings = []
    tie = near_tie(want, got, greedy="greedy" in query, stored=module.stored)
    if tie is not None:
        what = f"decides otherwise at a near-tie of {tie:.1e}; what follows from it is not compared"
        out.append((query, what, 0.0, 0.0))
    for name, op in module.outputs:
        value = want[name]
        if tie is not None and not name.startswith(("present.key", "present.value")):
            continue
        if tensor(op).dtype in ("i64", "bool"):
            out.append((query, name, float(not np.array_equal(value, got[name])), 0.0))
            continue
        top = max(1.0, float(np.abs(value[np.isfinite(value)]).max(initial=0.0)))
        with np.errstate(invalid="ignore"):
            error = np.where(value == got[name], 0.0, np.abs(value - got[name])).max(initial=0.0)
        limit = knobs.CHECK_TOLERANCE[module.stored] * (10 if name == "margin" else 1)
        out.append((query, name, float(error) / top, limit))
    return out


def near_tie(
    want: Mapping[str, Values], got: Mapping[str, Values], *, greedy: bool, stored: str = "f32"
) -> float | None:
    """Return the margin at which one row's emitted tokens part, if it is a tie; None otherwise.

    In greedy graphs token j is decided by margin j, the lead of a logit. In sampled ones, by the
    test of draft j or by the carry's draw, whose margin is the last.
    """
    if "margin" not in want or np.array_equal(want["emitted"], got["emitted"]):
        return None
    (row,) = want["emitted"]
    at = int(np.flatnonzero(row != got["emitted"][0])[0])
    margins = np.abs(want["margin"][0])
    decided = margins[[at]] if greedy else margins[[min(at, len(margins) - 1), -1]]
    smallest = float(decided.min())
    limit = (knobs.LOGIT_TIE if greedy else knobs.CHANCE_TIE) * knobs.WIDER_TIE[stored]
    return smallest if smallest <= limit else None


def _inputs(
    engine: Engine, query: str, prompt: list[int], rng: np.random.Generator
) -> dict[str, Values]:
    """Return the inputs of a graph in the middle of a generation."""
    session = engine.session(greedy="greedy" in query, seed=int(rng.integers(1 << 32)))
    batch = batch_of(engine)
    session.generate_ids([prompt] * batch if batch > 1 else prompt, 2)
    rounds = session.rounds
    assert rounds is not None
    rounds.place.quiet()
    rounds.reserve(rounds.buckets[-1]["rows"])  # the sizes that the module was written for
    call, spec = rounds.call(rounds.step_name), rounds.spec
    out: dict[str, Any] = {}
    for i in engine.queries[query]["inputs"]:
        name, kind = i["name"], STORED.get(i["dtype"])
        shape = [batch, *(d for d in i["shape"][1:])]
        if name.startswith("past."):
            out[name] = rounds.states.read(name[5:])
        elif name == "length":
            out[name] = rounds.length.copy()
        elif name in ("window", "draft_q"):
            out[name] = call[name].copy()
        elif name == "input_ids":
            out[name] = rng.integers(0, int(spec["vocab"]), shape)
        elif name == "valid":
            out[name] = np.full(batch, min(3, int(spec["chunk"])))
        elif name == "u":
            out[name] = (rng.integers(0, 1 << 24, shape) / (1 << 24)).astype(kind)
        else:
            out[name] = np.full(shape, {"top_k": 0}.get(name, 1), kind)
    return out
