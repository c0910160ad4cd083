"""Generation checked: graphs against the float64 evaluator, text against autoregressive decoding.

The float64 evaluator runs the same tensor modules that the graphs were lowered from, on the states
of a real generation. Where a graph with uniforms draws otherwise, it is a tie if the evaluator too
computes that, all of it, when one of them is moved a little (`pcc.ties`); where a greedy graph
chooses otherwise, if two logits were near. Greedy text is compared with plain one-token decoding;
where the two differ, the logit gap at the first difference tells a near-tie (an n-wide and a
one-wide pass round differently) from a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from pcc.runtime.philox import ROLES
from pcc.runtime.vocabulary import Vocabulary
from pcc.stored import Stages
from pcc.tensor.ops import Const
from pcc.ties import Shift, explained, shifts

MOST_TIES = 3  # of one call: in bf16 one of three has one, and what follows from it may have more
HALVINGS = 6  # of a uniform's shift: a latent may move twice and show what it did before
PROMPT = 24  # tokens of the prompt that checks start from
Errors = list[tuple[str, float, float]]  # what, error, tolerance
Findings = list[tuple[str, str, float, float]]  # the same of a query


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
        tie = knobs.LOGIT_TIES[stages.module("tensor-verify").stored]
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
    want = _evaluated(module, wide)
    roles = [role for role, _ in engine.generation()["random"].get(query, ())]  # of its uniforms
    found: Findings = []
    for rows in (1, 2) if spec.get("one_row") else (1,):  # the graph for one row, and for any
        answers = engine.runner.answer(query, inputs, rows)
        made = zip([o["name"] for o in spec["outputs"]], answers, strict=True)
        got = {k: _numbers(v, kinds[k]) for k, v in made}
        note = " (graph for any number of rows)" if rows > 1 else ""
        batch = batch_of(engine)
        for b in range(batch):
            at = f" (row {b})" if batch > 1 else note
            one = [_row(x, got, b) for x in (want, got)]
            given = {k: v[b : b + 1] for k, v in wide.items()}
            found += [(query, w + at, e, x) for w, e, x in _compared(module, given, roles, *one)]
    return found


def _evaluated(module: Module, inputs: Mapping[str, Values]) -> dict[str, Values]:
    """Return the outputs of a module by name, in float64."""
    values = run(module.roots, inputs, Semiring())
    return dict(zip((name for name, _ in module.outputs), values, strict=True))


def _row(outputs: Mapping[str, Values], like: Mapping[str, Values], b: int) -> dict[str, Values]:
    """Return a row of outputs, which may lack the batch axis of those that they are compared to."""
    return {k: np.broadcast_to(v, like[k].shape)[b : b + 1] for k, v in outputs.items()}


def _numbers(value: Values, kind: str) -> Values:
    """Return float64 of any float type; on a device, bf16 is kept as its bits."""
    if kind == "bf16":
        value = value.view(dtype_of(kind))
    return value.astype(np.float64) if kind in ("f32", *HALVES) else value


def _compared(
    module: Module,
    given: Mapping[str, Values],
    roles: Sequence[str],
    want: Mapping[str, Values],
    got: Mapping[str, Values],
) -> Errors:
    """Compare one row of the outputs of a graph: (what, error, tolerance).

    Integers must be equal, unless a tie decides them.
    """
    found = _errors(module, want, got)
    if "u" in given:
        return found if _agree(found) else _moved(module, given, roles, want, got) or found
    if (tie := near_tie(want, got, stored=module.stored)) is None:
        return found
    what = f"decides otherwise at a near-tie of {tie:.1e}; what follows from it is not compared"
    kept = ("present.key", "present.value")
    return [(what, 0.0, 0.0), *(x for x in found if x[0].startswith(kept))]


def _agree(found: Errors) -> bool:
    return all(error <= limit for _, error, limit in found)


def _errors(module: Module, want: Mapping[str, Values], got: Mapping[str, Values]) -> Errors:
    """Return for each output how far it is off, and how far it may be: integers must be equal."""
    out: Errors = []
    for name, op in module.outputs:
        value = want[name]
        if tensor(op).dtype in ("i64", "bool"):
            out.append((name, float(not np.array_equal(value, got[name])), 0.0))
            continue
        top = max(1.0, float(np.abs(value[np.isfinite(value)]).max(initial=0.0)))
        with np.errstate(invalid="ignore"):
            error = np.where(value == got[name], 0.0, np.abs(value - got[name])).max(initial=0.0)
        limit = knobs.CHECK_TOLERANCE[module.stored] * (10 if name == "margin" else 1)
        out.append((name, float(error) / top, limit))
    return out


def _moved(
    module: Module,
    given: Mapping[str, Values],
    roles: Sequence[str],
    want: Mapping[str, Values],
    got: Mapping[str, Values],
) -> Errors | None:
    """Compare with what the evaluator computes from moved uniforms; None if none explain it.

    One draw after the other, in their order: a draw that has gone the other way brings others.
    """
    moved: list[Shift] = []
    values = dict(want)

    def again(shift: Shift) -> dict[str, Values]:
        u = given["u"].copy()
        for s in (*moved, shift):
            s.move(u)
        return _row(_evaluated(module, {**given, "u": u}), got, 0)

    while len(moved) < MOST_TIES:
        far = shifts(0, [0], _deciding(roles, values, got), knobs.CHANCE_TIES[module.stored])
        free = [s for s in far if s.slot not in {m.slot for m in moved}]
        closer = partial(_closer, module, got, _reached(values, got))
        search = explained(free, values, again, closer, _same, halvings=HALVINGS)
        if search.shift is None or search.answer is None:
            return None
        moved.append(search.shift)
        values = search.answer
        errors = _errors(module, values, got)
        if _agree(errors):
            by = ", ".join(f"{s.slot} by {s.by:.1e}" for s in moved)
            what = f"draws otherwise at a tie: so does float64, with uniforms moved: {by}"
            return [(what, 0.0, 0.0), *errors]
    return None


def _same(a: Mapping[str, Values], b: Mapping[str, Values]) -> bool:
    return all(np.array_equal(v, b[k]) for k, v in a.items() if k != "margin")


def _closer(
    module: Module, got: Mapping[str, Values], reached: int, values: Mapping[str, Values]
) -> bool:
    """Return whether values are what a graph gave, or agree with it on more draws than before."""
    return _reached(values, got) > reached or _agree(_errors(module, values, got))


def _reached(values: Mapping[str, Values], got: Mapping[str, Values]) -> int:
    """Return on how many tokens two rows agree: those that are emitted, then the next window's."""
    tokens = [np.concatenate([x["emitted"][0], x["next_window"][0]]) for x in (values, got)]
    parted = np.flatnonzero(tokens[0] != tokens[1])
    return int(parted[0]) if parted.size else len(tokens[0])


def _deciding(
    roles: Sequence[str], values: Mapping[str, Values], got: Mapping[str, Values]
) -> list[int]:
    """Return the uniforms of which one may have drawn otherwise.

    Where the emitted tokens part, those of the tests of drafts and of the carry. Else the one of
    the first draft that is another, and those of all latents, which may show in a law alone.
    """
    slots = {r: [k for k, role in enumerate(roles) if role == r] for r in ROLES}
    if not np.array_equal(values["emitted"], got["emitted"]):
        return slots["accept"] + slots["carry"]
    parted = np.flatnonzero(values["next_window"][0] != got["next_window"][0])  # 0 is the carry
    return [slots["token"][k - 1] for k in parted[:1]] + slots["latent"]


def near_tie(
    want: Mapping[str, Values], got: Mapping[str, Values], *, stored: str = "f32"
) -> float | None:
    """Return the lead at which one row's emitted tokens part, if it is a tie; None otherwise.

    Token j of a greedy graph is decided by margin j, the lead of a logit.
    """
    if "margin" not in want or np.array_equal(want["emitted"], got["emitted"]):
        return None
    (row,) = want["emitted"]
    at = int(np.flatnonzero(row != got["emitted"][0])[0])
    lead = abs(float(want["margin"][0, at]))
    return lead if lead <= knobs.LOGIT_TIES[stored] else None


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
