"""The graphs of generation: `step`, `step_greedy`, `prefill`, `prefill_greedy`, `verify`.

A step processes the window d_1..d_n (the carry, then the drafts) at positions length..length+n-1,
decides how many stay (pcc.models.acceptance), draws the new carry, and drafts the next window from
the features at the last token that stays. Names of inputs and outputs are those of the ONNX graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import numpy as np

from pcc import knobs
from pcc.circuit.circuit import Circuit
from pcc.errors import PccError
from pcc.ir.core import Op, tensor
from pcc.ir.module import Module
from pcc.ir.verify import verify as check_module
from pcc.models import acceptance as ac
from pcc.models import proposal as pr
from pcc.models.base import Model, Pass, StateSpec
from pcc.models.divided import PASS, Handed, handed_on
from pcc.passes import pieces as mk
from pcc.passes.draw import Slot
from pcc.passes.manager import Manager
from pcc.tensor import ops as t

OPTIONAL = ("logits", "hidden_states", "margin", "log_probs")


@dataclass(frozen=True)
class StepOptions:
    """Choices made at compile time.

    `truncation=False` leaves out `draft_temperature` and `draft_top_p`, with their cost; `extras`
    are optional outputs. `maps`: chains of draws as maps (pcc.passes.draw_maps), for GPUs.
    """

    proposal: str = knobs.PROPOSAL
    draft_mode: str = knobs.DRAFT_MODE
    truncation: bool = True
    extras: tuple[str, ...] = ()
    maps: bool = False

    def __post_init__(self) -> None:
        if bad := [x for x in self.extras if x not in OPTIONAL]:
            raise PccError("M143", f"unknown outputs {bad}", hint=f"of {', '.join(OPTIONAL)}")


@dataclass(frozen=True)
class StepGraph:
    """A module, its graph's inputs in order, its uniforms, and the open axes of its states."""

    module: Module
    inputs: tuple[t.Input, ...]
    slots: tuple[Slot, ...]
    symbols: Mapping[str, Mapping[int, str]]


def step_graphs(
    model: Model,
    circuit: Circuit,
    *,
    max_seq: int,
    chunk: int,
    options: StepOptions | None = None,
    manager: Manager | None = None,
) -> dict[str, StepGraph]:
    """Return every graph of generation by name, for buffers of max_seq + max(n, chunk) rows."""
    work = Steps(model, circuit, max_seq + max(circuit.n, chunk), options, manager)
    return {
        "step": work.step(),
        "step_greedy": work.step_greedy(),
        "prefill": work.prefill(chunk),
        "prefill_greedy": work.prefill_greedy(chunk),
        "verify": work.verify(circuit.n),
    }


class Steps:
    """Builds the graphs of one model and one circuit; proposals are compiled once."""

    def __init__(
        self,
        model: Model,
        circuit: Circuit,
        rows: int,
        options: StepOptions | None = None,
        manager: Manager | None = None,
    ) -> None:
        _matching(model, circuit)
        self.model: Model = model
        self.circuit, self.rows = circuit, rows
        self.options, self.manager = options or StepOptions(), manager or Manager()
        self.n = circuit.n
        self.states = model.states(rows)
        self._proposals: dict[str, pr.Proposal] = {}

    # ------------------------------------------------------------ graphs

    def step(self) -> StepGraph:
        """Accept by chance, draw the carry and the drafts."""
        window, length, active = _ids("window", self.n), _scalar("length"), _flag("active")
        draft_q = t.Input("draft_q", "f32", "b", (self.n - 1, self.model.vocab))
        law, draft = _law_settings(), self.sampled()
        slots = (
            *(Slot("accept", 0, i) for i in range(1, self.n)),
            Slot("carry", 0, 0),
            *draft.slots,
        )
        u = t.Input("u", "f32", "b", (len(slots),))
        made = self._forward(window, length)
        verdict = ac.sampled(
            ac.verifier_law(made.logits, *law), draft_q, window, mk.take(u, range(self.n))
        )
        x, q = self._drafted(draft, made, verdict, mk.take(u, range(self.n, len(slots))))
        outs = self._round(window, length, active, verdict, made, x)
        outs["next_draft_q"] = t.Where(mk.reshape(active, (1, 1)), q, draft_q)
        inputs = [window, draft_q, length, active, *law, *self._draft_settings(), u]
        return self._graph("step", inputs, outs, slots)

    def step_greedy(self) -> StepGraph:
        """Accept what the verifier would choose."""
        window, length, active = _ids("window", self.n), _scalar("length"), _flag("active")
        made = self._forward(window, length)
        verdict = ac.greedy(made.logits, window)
        (x,) = self._drafted(self.greedy(), made, verdict, None)
        outs = self._round(window, length, active, verdict, made, x)
        return self._graph("step_greedy", [window, length, active], outs)

    def prefill(self, chunk: int) -> StepGraph:
        """Process prompt tokens; the carry and drafts that follow the last valid one."""
        ids, valid, length = _ids("input_ids", chunk), _scalar("valid"), _scalar("length")
        law, draft = _law_settings(), self.sampled()
        slots = (Slot("carry", 0, 0), *draft.slots)
        u = t.Input("u", "f32", "b", (len(slots),))
        made = self._forward(ids, length)
        last = _last(valid)
        p = ac.verifier_law(ac.row_at(made.logits, last), *law)
        carry = mk.reshape(t.InverseCdf(p, mk.take(u, [0])), ())
        margin = ac.edge(p, mk.take(u, [0]))
        verdict = ac.Verdict(t.Add(last, mk.const(np.int64(1))), carry, margin)
        x, q = self._drafted(draft, made, verdict, mk.take(u, range(1, len(slots))))
        outs = {**self._prompt(length, valid, verdict, made, x), "next_draft_q": q}
        inputs = [ids, valid, length, *law, *self._draft_settings(), u]
        return self._graph("prefill", inputs, outs, slots)

    def prefill_greedy(self, chunk: int) -> StepGraph:
        """Process prompt tokens; the largest carry and the greedy drafts that follow."""
        ids, valid, length = _ids("input_ids", chunk), _scalar("valid"), _scalar("length")
        made = self._forward(ids, length)
        last = _last(valid)
        row = ac.row_at(made.logits, last)
        best = t.ArgMax(row)
        count = t.Add(last, mk.const(np.int64(1)))
        verdict = ac.Verdict(count, mk.reshape(best, ()), ac.lead(row, best))
        (x,) = self._drafted(self.greedy(), made, verdict, None)
        outs = self._prompt(length, valid, verdict, made, x)
        return self._graph("prefill_greedy", [ids, valid, length], outs)

    def verify(self, width: int, name: str = "verify") -> StepGraph:
        """Process `width` tokens, all of them committed; no draft."""
        ids, length = _ids("input_ids", width), _scalar("length")
        made = self._forward(ids, length)
        outs = {"logits": made.logits, "hidden_states": made.hidden}
        outs.update(_present(made, mk.const(np.int64(width))))
        return self._graph(name, [ids, length], outs)

    def passed(self, count: int) -> StepGraph:
        """Process `count` tokens: the part of every graph that `pcc.models.divided` names."""
        ids, length = _ids("input_ids", count), _scalar("length")
        return self._graph(PASS, [ids, length], handed_on(self._forward(ids, length)))

    def following(self) -> Steps:
        """Return the graphs of what follows such a pass; proposals are compiled once for both."""
        other = copy(self)
        other.model = Handed(self.model)
        return other

    # ------------------------------------------------------------ proposals

    def sampled(self) -> pr.Proposal:
        """Return the compiled sampled draft."""
        if "sampled" not in self._proposals:
            self._proposals["sampled"] = pr.sampled(
                self.circuit,
                self.manager,
                self.options.proposal,
                truncation=self.options.truncation,
                maps=self.options.maps,
            )
        return self._proposals["sampled"]

    def greedy(self) -> pr.Proposal:
        """Return the compiled greedy draft."""
        if "greedy" not in self._proposals:
            self._proposals["greedy"] = pr.greedy(
                self.circuit, self.manager, self.options.draft_mode
            )
        return self._proposals["greedy"]

    def _draft_settings(self) -> tuple[t.Input, ...]:
        return pr.settings() if self.options.truncation else ()

    # ------------------------------------------------------------ parts

    def _forward(self, ids: Op, length: Op) -> Pass:
        past: dict[str, Op] = {s.name: _past(s) for s in self.states}
        made = self.model.forward(ids, length, past)
        for what, x, width in (
            ("logits", made.logits, self.model.vocab),
            ("hidden", made.hidden, self.model.width),
            ("draft_hidden", made.draft_hidden, self.model.width),
        ):
            want = (tensor(ids).shape[0], width)
            if tensor(x).shape != want:
                raise PccError("M144", f"the model's {what} is {tensor(x)}, expected {want}")
        return made

    def _drafted(
        self, draft: pr.Proposal, made: Pass, verdict: ac.Verdict, u: Op | None
    ) -> tuple[Op, ...]:
        """Splice the compiled draft in: its context is the row of the last committed token."""
        for made_of in (verdict.committed, verdict.carry):
            mk.place(made_of, "acceptance")
        row = ac.row_at(made.draft_hidden, ac.before(verdict.committed))
        values: dict[str, Op] = {
            "carry": verdict.carry,
            "context": mk.reshape(row, (self.model.width,)),
        }
        if u is not None:
            values["u"] = u
        outs = pr.splice(draft.module.roots, values)
        for out in outs:
            mk.place(out, "draft")
        return outs

    def _round(
        self, window: Op, length: Op, active: Op, verdict: ac.Verdict, made: Pass, x: Op
    ) -> dict[str, Op]:
        zero = mk.const(np.int64(0))
        count = t.Where(active, verdict.committed, zero)
        on = mk.reshape(active, (1,))
        out = ac.emitted(window, verdict)
        following = mk.concat([mk.reshape(verdict.carry, (1,)), x])
        outs: dict[str, Op] = {
            "n_emit": count,
            "emitted": t.Where(on, out, mk.const(np.full(self.n, -1))),
            "next_window": t.Where(on, following, window),
            "next_length": t.Add(length, count),
        }
        outs.update(_present(made, count))
        outs.update(self._extras(made, verdict, outs["emitted"], made.logits))
        return outs

    def _prompt(
        self, length: Op, valid: Op, verdict: ac.Verdict, made: Pass, x: Op
    ) -> dict[str, Op]:
        carry = mk.reshape(verdict.carry, (1,))
        outs: dict[str, Op] = {
            "emitted": carry,
            "next_window": mk.concat([carry, x]),
            "next_length": t.Add(length, valid),
        }
        outs.update(_present(made, valid))
        logits = ac.row_at(made.logits, ac.before(verdict.committed))
        outs.update(self._extras(made, verdict, carry, logits))
        return outs

    def _extras(self, made: Pass, verdict: ac.Verdict, emitted: Op, logits: Op) -> dict[str, Op]:
        outs: dict[str, Op] = {}
        for name in self.options.extras:
            if name == "logits":
                outs[name] = made.logits
            elif name == "hidden_states":
                outs[name] = made.hidden
            elif name == "margin":
                outs[name] = verdict.margin
            else:
                outs[name] = _log_probs(logits, emitted)
        return outs

    def _graph(
        self, name: str, inputs: list[t.Input], outs: dict[str, Op], slots: tuple[Slot, ...] = ()
    ) -> StepGraph:
        cards = self.circuit.cards
        module = Module(name, cards, tuple(outs.items()))
        check_module(module, stage="tensor")
        past = tuple(_past(s) for s in self.states)
        return StepGraph(module, (*inputs, *past), slots, _symbols(self.states))


def _matching(model: Model, circuit: Circuit) -> None:
    """Raise where head and verifier do not belong together."""
    if set(circuit.cards) != {model.vocab}:
        raise PccError(
            "M145",
            f"the head is over {sorted(set(circuit.cards))} values, the verifier has "
            f"{model.vocab} token ids",
            hint="use the verifier that the head was trained for",
        )
    inputs = circuit.inputs()
    if bad := sorted(set(inputs) - {"context"}):
        raise PccError("M146", f"the head reads {bad}", hint="a step gives it 'context' only")
    if "context" in inputs and inputs["context"].shape != (model.width,):
        raise PccError(
            "M147",
            f"the head reads features of shape {inputs['context'].shape}, the verifier's have "
            f"{model.width} numbers",
            hint="use the verifier that the head was trained for",
        )


def _ids(name: str, count: int) -> t.Input:
    return t.Input(name, "i64", "b", (count,))


def _scalar(name: str) -> t.Input:
    return t.Input(name, "i64", "b", ())


def _flag(name: str) -> t.Input:
    return t.Input(name, "bool", "b", ())


def _law_settings() -> tuple[t.Input, t.Input, t.Input]:
    return (
        t.Input("temperature", "f32", "b", ()),
        t.Input("top_k", "i64", "b", ()),
        t.Input("top_p", "f32", "b", ()),
    )


def _past(state: StateSpec) -> t.Input:
    return t.Input(f"past.{state.name}", state.dtype, "b", state.shape)


def _present(made: Pass, count: Op) -> dict[str, Op]:
    return {f"present.{name}": x for name, x in made.present(count).items()}


def _symbols(states: tuple[StateSpec, ...]) -> dict[str, dict[int, str]]:
    """Name the axes whose size the graph leaves open: the rows of caches."""
    out: dict[str, dict[int, str]] = {}
    for s in states:
        if s.rows_axis is not None:
            for side in ("past", "present"):
                out[f"{side}.{s.name}"] = {s.rows_axis: s.rows_name}
    return out


def _last(valid: Op) -> Op:
    """max(valid, 1) - 1: the row of the last valid token."""
    one = mk.const(np.int64(1))
    return t.Sub(t.Where(t.Less(one, valid), valid, one), one)


def _log_probs(logits: Op, emitted: Op) -> Op:
    """Return log softmax(logits)[i, emitted[i]], of the model; 0 where none was emitted."""
    (n,) = tensor(emitted).shape
    none = t.Less(emitted, mk.const(np.zeros(n, np.int64)))
    safe = t.Where(none, mk.const(np.zeros(n, np.int64)), emitted)
    logs = ac.at_tokens(t.LogSoftmax(logits), safe)
    return t.Where(none, mk.full((n,), 0.0), logs)
