"""Which verifiers and heads the protocol is checked on, and the loop over them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from pcc.bundle import read_manifest
from pcc.conformance import verifiers
from pcc.conformance.bundles import BUILD, HOSTED, InOrder, Order, Setting, open_bundle
from pcc.conformance.edge import Values
from pcc.conformance.hosted import evaluated
from pcc.conformance.models import WIDE
from pcc.conformance.protocol import RUNS, SUITE, Run, Trace, judge, play, prompts_of
from pcc.conformance.report import Finding, built_only, refused
from pcc.driver import compile
from pcc.errors import PccError
from pcc.runtime.engine import Engine
from pcc.runtime.measure import Autoregressive
from pcc.targets import target_of
from pcc.ties import Shift

Say = Callable[[str], None]
HOST = Setting()  # where expectations come from: ONNX on a CPU
EVALUATED = "bf16"  # but here: no runtime of a CPU has its products
TOO_LARGE = "V110"  # of a model that the evaluator does not take


@dataclass(frozen=True)
class Scenario:
    """A verifier with a head, compile options, and the precisions in which it says something."""

    name: str
    make: Callable[[Path], verifiers.Pair]
    options: dict[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = ("fp32",)
    batches: tuple[int, ...] = (1,)
    needs: str = ""  # a module without which the verifier cannot be read
    folder: Path | None = None  # of a checkout, without which there is nothing to read


SHIPPED = Path(__file__).resolve().parents[2] / "examples/models"


def shipped(head: str, *more: str) -> Scenario:
    """Return the scenario of a trained head of the checkout and its verifier; fp32 and `more`."""
    make = partial(_named, SHIPPED / head, SHIPPED / "backbone")
    return Scenario(
        f"shipped-{head}", make, precisions=("fp32", *more), needs="yaml", folder=SHIPPED / head
    )


def given(head: Path | None, verifier: Path) -> Scenario:
    """Return the scenario of any head and verifier, in every precision, alone and in a batch."""
    make = partial(_named, head, verifier)
    return Scenario("given", make, precisions=EVERY, batches=(1, 2, 3, 4))


def _named(head: Path | None, verifier: Path, _: Path) -> verifiers.Pair:
    return head, verifier


LATENT = {"proposal": "latent-first", "draft_mode": "latent-first"}
EVERY = ("fp32", "fp16", "bf16")
SCENARIOS = (
    Scenario("llama-hmm-n4", verifiers.llama, precisions=EVERY, batches=(1, 3)),
    Scenario("llama-ff-n2", partial(verifiers.llama, kind="ff", n=2)),
    Scenario("llama-cp-n3-latent-first", partial(verifiers.llama, kind="cp", n=3), LATENT),
    Scenario("llama-btree-n16", partial(verifiers.llama, kind="btree", n=16, r=2)),
    Scenario(
        "byte-llama-btree-n8", verifiers.byte_llama, precisions=("fp32", "bf16"), batches=(1, 3)
    ),
    Scenario("evabyte-own-heads-n4", verifiers.evabyte, batches=(1, 3)),
    Scenario("evabyte-hmm-n6", partial(verifiers.evabyte, kind="hmm", n=6, r=2)),
    Scenario("gpt-cp-n4", verifiers.gpt, needs="yaml"),
    Scenario("lora-cp-n4", verifiers.lora, needs="yaml"),
    # Heads of 128 numbers and whole tiles: what hand-written kernels take.
    Scenario(
        "wide-llama-btree-n8", partial(verifiers.llama, kind="btree", n=8, r=4, size=WIDE),
        precisions=EVERY, batches=(1, 3),
    ),
    Scenario(
        "wide-evabyte-btree-n16", partial(verifiers.evabyte, kind="btree", n=16, r=4, size=WIDE),
        precisions=EVERY,
    ),
    Scenario(
        "wide-llama-btree-n4-int8", partial(verifiers.llama, kind="btree", n=4, r=4, size=WIDE),
        {"int8": "all"}, precisions=("fp16", "bf16"), batches=(1, 3),
    ),
    *map(shipped, ("ff-n8", "cp-n8")),
    *(shipped(head, "bf16") for head in ("hmm-n8", "btree-n8", "btree-n8-lora")),
)  # fmt: skip


def bundle_of(scenario: Scenario, setting: Setting, folder: Path) -> Path:
    """Return where the bundle of a scenario is put."""
    made_for = f"{setting.target}-{setting.precision}-{setting.batch}"
    return folder / f"{scenario.name}-{made_for}" / "m.pcc"


def built(scenario: Scenario, setting: Setting, folder: Path) -> Path:
    """Compile a scenario for a target, once for each folder."""
    out = bundle_of(scenario, setting, folder)
    place = out.parent
    if not out.exists():
        place.mkdir(parents=True, exist_ok=True)
        source, model = scenario.make(place)
        how: dict[str, Any] = {"max_seq": 256, "chunk": 8, "queries": ["draft"], "validate": False}
        compile(source, verifier=model, out=out, **(how | scenario.options | setting.options()))
    return out


def expected(scenario: Scenario, batch: int, precision: str, folder: Path) -> dict[str, Any]:
    """Return the traces of every run as JSON, as a CPU makes them."""
    setting = Setting(HOSTED, precision=precision, batch=batch)
    engine = Host(scenario, setting, folder).engine
    return {run.name: play(engine, run, batch).plain() for run in RUNS}


def wanted(scenario: Scenario, setting: Setting) -> bool:
    """Return whether a scenario is part of the suite at this precision and batch size.

    One with 8-bit weights is for targets that have them beside the precision. Sessions on a CPU
    have one row where graphs have a fixed number.
    """
    fits = setting.precision in scenario.precisions and setting.batch in scenario.batches
    fits = fits and int8_there(scenario, setting)
    one = setting.provider == "cpu" and target_of(setting.target, setting.precision).static
    return fits and setting.takes(scenario.name) and not (one and setting.batch > 1)


def int8_there(scenario: Scenario, setting: Setting) -> bool:
    """Return whether a target has the 8-bit weights that a scenario asks for, if it does."""
    return "int8" not in scenario.options or setting.precision in target_of(setting.compiled).int8


def key_of(scenario: Scenario, batch: int, precision: str) -> str:
    """Return the name of a scenario's expectations."""
    return f"{scenario.name} {precision} batch {batch}"


def check_protocol(
    setting: Setting, folder: Path, say: Say, stored: Mapping[str, Any] | None = None,
    scenarios: tuple[Scenario, ...] = SCENARIOS, order: Order | None = None,
) -> Iterator[Finding]:  # fmt: skip
    """Yield findings for the scenarios of a precision and batch size.

    `stored` are expectations made elsewhere; without, the `Host` makes them here.
    """
    taken = [s for s in scenarios if wanted(s, setting)]
    for s in (order or InOrder()).of(taken, lambda s: bundle_of(s, setting, folder)):
        case = key_of(s, setting.batch, setting.precision)
        if s.needs and importlib.util.find_spec(s.needs) is None:
            yield Finding(SUITE, case, "", "skipped", note=f"{s.needs} is not installed")
            continue
        if s.folder is not None and not s.folder.is_dir():
            yield Finding(SUITE, case, "", "skipped", note="the checkout has the trained models")
            continue
        say(f"protocol of {case}")
        try:
            yield from _scenario(s, case, setting, folder, stored)
        except PccError as e:
            if e.code == TOO_LARGE:
                yield Finding(SUITE, case, "", "skipped", note=f"[{e.code}] {e.what}")
            else:
                yield refused(SUITE, case, e)


def _scenario(
    s: Scenario, case: str, setting: Setting, folder: Path, stored: Mapping[str, Any] | None
) -> Iterator[Finding]:
    if setting.provider == BUILD:
        graphs = read_manifest(built(s, setting, folder))["queries"]
        yield from built_only(SUITE, case, graphs)
        return
    host = Host(s, setting, folder)
    if stored is not None and case not in stored and setting.precision != EVALUATED:
        yield Finding(SUITE, case, "", "skipped", note="the stored expectations lack it")
        return
    engine = open_bundle(setting, built(s, setting, folder))
    slots = max((len(v) for v in engine.generation()["random"].values()), default=0)
    wide = target_of(setting.target).wide
    for run in RUNS:
        if stored is None or case not in stored:
            want = play(host.engine, run, setting.batch)
        else:
            want = Trace.read(stored[case][run.name])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", RuntimeWarning)
            got = play(engine, run, setting.batch)
        for w in heard:  # that rounds are not recorded, say: not what the backend promises
            if issubclass(w.category, RuntimeWarning):
                yield Finding(SUITE, case, run.name, "refused", note=str(w.message))
        again = partial(host.again, run) if host.again_there else None
        behind = host.behind if host.there else None
        yield from judge(
            case, run, want, got, setting.precision, again, slots, behind, wide=wide
        )  # fmt: skip


@dataclass
class Host:
    """What the texts of a scenario are judged by, made when it is first asked for.

    The CPU's bundle; in bf16, which no runtime of a CPU has, the float64 evaluator on the modules
    that the setting's own bundle was lowered from.
    """

    scenario: Scenario
    setting: Setting
    folder: Path

    @property
    def there(self) -> bool:
        """Whether this machine can run it."""
        evaluated = self.setting.precision == EVALUATED
        return evaluated or importlib.util.find_spec("onnxruntime") is not None

    @property
    def again_there(self) -> bool:
        """Whether it plays fast enough to be asked again and again."""
        return self.there and self.setting.precision != EVALUATED

    @cached_property
    def engine(self) -> Engine:
        """The reference, opened."""
        if self.setting.precision == EVALUATED:
            return evaluated(built(self.scenario, self.setting, self.folder))
        host = replace(HOST, precision=self.setting.precision)
        return open_bundle(host, built(self.scenario, host, self.folder))

    @cached_property
    def plain(self) -> Autoregressive:
        """Its one-token passes."""
        return Autoregressive(self.engine)

    def again(self, run: Run, shift: Shift) -> Trace:
        """Play a run with a shifted uniform."""
        return play(self.engine, run, self.setting.batch, shift)

    def behind(self, row: int, ids: list[int]) -> Values:
        """Return how far each id's logit lies behind the largest, given the row's ids before it."""
        prompt = prompts_of(self.engine, self.setting.batch)[row]
        logits = self.plain.following([*prompt, *ids[:-1]], len(prompt))
        return np.asarray(logits.max(axis=1) - logits[np.arange(len(ids)), ids])
