"""Forms of one head, and the launches of a round of each on target cuda.

A form is how a head drafts (`proposal`, or `draft_mode` of greedy decoding) and whether its
matrices are 8-bit integers. All forms of a head and a verifier give the same text, or the same law
of it: they differ in what a round costs and in how many drafts stay. Launches are planned by what
compiles them, but nothing is compiled by nvcc, and no weight is read or made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pcc import knobs
from pcc.backends.cuda.builder import Builder
from pcc.backends.cuda.gpu import Gpu
from pcc.backends.cuda.partition import partition
from pcc.circuit.circuit import Circuit
from pcc.driver import load_source
from pcc.errors import PccError
from pcc.explore.points import LATENT_FIRST
from pcc.generation import EXTRAS, Request, own_heads
from pcc.models.proposal import GREEDY_KINDS, KINDS
from pcc.models.step import StepOptions, Steps
from pcc.passes.manager import Manager
from pcc.passes.pipelines import storage_pipeline
from pcc.passes.restrict import restrict
from pcc.shapes import Synthetic
from pcc.targets import HALF_OF
from pcc.tensor.ops import ScaledContract

INT8 = "+int8"


@dataclass(frozen=True)
class Form:
    """`draft`: a proposal, or greedily a draft mode. `int8`: the head's matrices are integers."""

    draft: str
    int8: bool = False

    @property
    def name(self) -> str:
        """As the command line has it: `full`, `full+int8`, `latent-first`."""
        return self.draft + INT8 * self.int8


def forms_of(circuit: Circuit, *, greedy: bool) -> tuple[Form, ...]:
    """Return every form of a head. A factorised head has no latents to draw first."""
    kinds: tuple[str, ...] = GREEDY_KINDS if greedy else KINDS
    if circuit.kind == "ff":
        kinds = (knobs.DRAFT_MODE if greedy else knobs.PROPOSAL,)
    both = ((d, i) for d in kinds for i in (False, True) if not (i and d == LATENT_FIRST))
    return tuple(Form(d, i) for d, i in both)


def form_of(name: str, known: tuple[Form, ...]) -> Form:
    """Return a form by name. Errors: G110."""
    found = {f.name: f for f in known}
    if name not in found:
        hint = f"one of {', '.join(found)}"
        raise PccError("G110", f"{name[:40]!r} is no form of this head", hint=hint)
    return found[name]


@dataclass(frozen=True)
class Engine:
    """What all forms share: the verifier, how it is stored, and for what work is divided."""

    verifier: Path | Synthetic
    gpu: Gpu
    precision: str = "bf16"
    int8: bool = False  # the verifier's matrices: another model than without
    batch: int = 1
    max_seq: int = knobs.SEQUENCE
    lora: Path | None = None

    def request(self) -> Request:
        """Return what is asked of the verifier."""
        return Request(self.verifier, self.max_seq, lora=self.lora, precision=self.precision,
                       int8=self.int8, static=True, truncation=False)  # fmt: skip


def head_of(
    source: Path | None, random: str | None, engine: Engine, window: int | None,
    frontend: Mapping[str, Any],
) -> Circuit:  # fmt: skip
    """Return the head in a source, else `random` of a shape, else the verifier's own.

    `window`: its first variables only. `frontend`: options of a checkpoint. Errors: E14x, M153, ...
    """
    if source is not None:
        circuit = load_source(source, **frontend)
    elif frontend:
        raise PccError("E145", f"{', '.join(frontend)}: there is no checkpoint to read")
    elif random is not None and isinstance(engine.verifier, Synthetic):
        circuit = engine.verifier.head(random)
    else:
        circuit = own_heads(engine.request())
    return circuit if window is None else restrict(circuit, window)


class Plans:
    """The launches of one head's forms. The verifier is read once. Errors: M1xx, E1xx."""

    def __init__(self, circuit: Circuit, engine: Engine) -> None:
        if circuit.n < 2:
            raise PccError("M151", "drafting needs a window of two or more tokens")
        self.circuit, self.engine = circuit, engine
        self._request = engine.request()
        self._model = self._request.read(circuit.n)

    def round(self, form: Form, *, greedy: bool) -> Builder:
        """Return the launches of a round, `step` or `step_greedy`. Errors: E141."""
        steps = self._steps(form, greedy=greedy)
        made = steps.step_greedy() if greedy else steps.step()
        return partition(made.module, made.inputs, self.engine.batch, None, "step", self.engine.gpu)

    def draft(self, form: Form) -> Builder:
        """Return the launches of a sampled draft alone."""
        module = self._steps(form, greedy=False).sampled().module
        return partition(module, (), self.engine.batch, None, "draft", self.engine.gpu)

    def tokens(self, width: int) -> Builder:
        """Return the launches of a pass over `width` tokens: 1 is autoregressive decoding."""
        made = self._steps(Form(knobs.PROPOSAL), greedy=False).verify(width)
        return partition(made.module, made.inputs, self.engine.batch, None, "pass", self.engine.gpu)

    def _steps(self, form: Form, *, greedy: bool) -> Steps:
        manager = Manager(validate=False)  # sizes are all that is read of a plan
        half = HALF_OF[self.engine.precision]
        module = self.circuit.module()
        if pipeline := storage_pipeline(half, int8=form.int8):
            module = manager.run(module, pipeline)
        if form.int8 and not any(isinstance(n, ScaledContract) for n in module.nodes()):
            what = "no matrix of the head can become integers of 8 bits"
            raise PccError("E141", what, hint="they map a context to parameters")
        head = replace(self.circuit, root=module.roots[0], logits=())
        kind = {"draft_mode" if greedy else "proposal": form.draft}
        options = StepOptions(truncation=False, extras=EXTRAS, maps=True, **kind)
        rows = self._request.max_seq + max(head.n, self._request.chunk)
        return Steps(self._model, head, rows, options, manager)
