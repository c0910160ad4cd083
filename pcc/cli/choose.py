"""`pcc choose`: which form of a head to compile for a GPU, by the model of its engine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcc.cli.checkpoints import HmmBias, Step, reading
from pcc.cli.output import Json, emit, printable, progress, table
from pcc.cli.sources import Architecture, Head, Shape, Source, Verifier
from pcc.errors import PccError
from pcc.knobs import SEQUENCE

if TYPE_CHECKING:
    from pcc.backends.cuda.gpu import Gpu
    from pcc.explore.forms import Form, Plans
    from pcc.explore.predicted import Priced, Ranking

Forms = Annotated[
    list[str] | None, typer.Option("--form", help="Only this form (repeatable), e.g. full+int8.")
]
Accepted = Annotated[
    list[str] | None, typer.Option(help="FORM=A: drafts accepted of a round (repeatable).")
]
CopyRate = Annotated[
    float | None,
    typer.Option(help="TB/s of a copy there (default: measured on the GPU present, else a table)."),
]
Verifier8 = Annotated[
    str | None, typer.Option(help="verifier: its matrices are integers in every form.")
]
LEAST_RATE, MOST_RATE = 0.01, 100.0  # TB/s: a tenth of the slowest GPU's, ten times the fastest's


@dataclass(frozen=True)
class Subject:
    """What the options name: a head, a verifier, and how the engine is to be compiled."""

    source: Path | None
    verifier: Path | None
    shape: str | None
    head: str | None
    precision: str
    int8: str | None
    batch: int
    max_seq: int
    window: int | None
    gpu: str | None
    frontend: Mapping[str, Any]


def choose(
    source: Source = None,
    verifier: Verifier = None,
    shape: Shape = None,
    head: Head = None,
    gpu: Architecture = None,
    copy_rate: CopyRate = None,
    form: Forms = None,
    accepted: Accepted = None,
    report: Annotated[Path | None, typer.Option(help="report.json of pcc explore.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy rounds, not sampled.")] = False,
    context: Annotated[int, typer.Option(help="Tokens before the round.")] = 1024,
    precision: Annotated[str, typer.Option(help="fp16 or bf16.")] = "bf16",
    int8: Verifier8 = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a call.")] = 1,
    max_seq: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = SEQUENCE,
    window: Annotated[int | None, typer.Option(help="Draft fewer variables.")] = None,
    step: Step = None,
    hmm_bias: HmmBias = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot (.svg or .png).")] = None,
    as_json: Json = False,
) -> None:
    """Predict a round of each form of a head on a GPU of target cuda, and pick one.

    Nothing is compiled and no weight is made: no GPU, no nvcc. Forms give the same text.
    """
    from pcc.cli import plots
    from pcc.explore.forms import form_of, forms_of
    from pcc.explore.predicted import Asked, ranking
    from pcc.explore.stated import stated

    if plot is not None:
        plots.ready(plot)
    s = Subject(source, verifier, shape, head, precision, int8, batch, max_seq, window, gpu,
                reading(step, hmm_bias))  # fmt: skip
    drafts = stated(accepted or ())
    plans = plans_of(s)
    known = forms_of(plans.circuit, greedy=greedy)
    forms = tuple(dict.fromkeys(form_of(f, known) for f in form)) if form else known
    counted = _reported(report, s, plans, forms, drafts, greedy=greedy)
    rate, where = copy_rate_of(copy_rate, gpu, plans.engine.gpu)
    made = ranking(plans, Asked(forms, drafts, context, greedy, rate, where))
    made["remarks"] += counted
    if plot is not None:
        plots.draw_choice(made, plot)
    commands = {f.name: command(s, f, plans, greedy=greedy) for f in forms}
    if as_json:
        emit({"subject": title(s, plans), **made, "commands": commands})
    else:
        show(made, title(s, plans), commands)


# ------------------------------------------------------------ what is asked


def plans_of(s: Subject) -> Plans:
    """Return the plans of a head and its verifier. Errors: G111, E1xx, M1xx, F1xx."""
    from pcc import arguments
    from pcc.backends.cuda.gpu import gpu_of
    from pcc.explore.forms import Engine, Plans, head_of
    from pcc.knobs import SEED
    from pcc.shapes import synthetic
    from pcc.targets import target_of

    target = target_of("cuda", s.precision)
    arguments.fitting(target, s.batch, s.gpu, None)
    _known(s)
    random = synthetic(s.shape, s.head, SEED, s.source, s.verifier)
    place = random or s.verifier
    if place is None:
        raise PccError("G111", "a round needs a verifier", hint="--verifier MODEL or --shape NAME")
    lora = s.source if s.source is not None and s.source.is_dir() else None
    engine = Engine(place, gpu_of(s.gpu), s.precision, s.int8 == "verifier", s.batch, s.max_seq,
                    lora)  # fmt: skip
    progress("reading the head")
    return Plans(head_of(s.source, s.head, engine, s.window, s.frontend), engine)


def _known(s: Subject) -> None:
    """Refuse what the model of the engine does not know, and what is no choice. Errors: G111."""
    if s.precision == "fp32":
        what = "the model was fitted to products of halves, not of fp32"
        raise PccError("G111", what, hint="--precision bf16 or fp16")
    if s.int8 not in (None, "verifier"):
        what = f"--int8 {s.int8[:40]}: whether the head has integers is a form"
        raise PccError("G111", what, hint="--int8 verifier, or nothing")


def _reported(
    report: Path | None, s: Subject, plans: Plans, forms: Sequence[Form], drafts: dict[str, float],
    *, greedy: bool,
) -> list[str]:  # fmt: skip
    """Add what a report has and nobody stated; return what is to be said of it. Errors: G113."""
    from pcc.explore.stated import measured

    if report is None:
        return []
    found, wide = measured(report, s.source, plans.circuit.n, forms, s.precision, greedy=greedy)
    wide = [name for name in wide if name not in drafts]
    drafts |= {name: value for name, value in found.items() if name not in drafts}
    return [f"the accepted drafts of {', '.join(wide)} were counted in fp32"] if wide else []


def copy_rate_of(given: float | None, asked: str | None, gpu: Gpu) -> tuple[float, str]:
    """Return the TB/s of a copy, and where the number is from. Errors: G111, X301.

    What is given; else what the GPU present does, where no other was asked for; else the table's.
    """
    from pcc.backends.cuda.gpu import present

    if given is not None:
        if not LEAST_RATE <= given <= MOST_RATE:
            hint = f"{LEAST_RATE:g} to {MOST_RATE:g}"
            raise PccError("G111", f"--copy-rate {given:g} TB/s", hint=hint)
        return given, "stated"
    if asked is None and present() is not None:
        from pcc.runtime.device.driver import device
        from pcc.runtime.measure_gpu import copy_bandwidth

        progress("timing a copy")
        return copy_bandwidth(device()), "measured"
    return gpu.copy_rate, f"table, {gpu.product}"


# ------------------------------------------------------------ what is said


def title(s: Subject, plans: Plans) -> str:
    """Return the name of the head and the verifier, and what all forms share."""
    c = plans.circuit
    verifier = s.shape or (s.verifier.name if s.verifier else "")
    integers = "+int8 verifier" if s.int8 else ""
    return f"{verifier}, {c.kind} n={c.n} r={c.rank}, {s.precision}{integers}, batch {s.batch}"


def command(s: Subject, form: Form, plans: Plans, *, greedy: bool) -> str:
    """Return the shell command that compiles a form."""
    words = ["pcc", "compile", *([str(s.source)] if s.source else [])]
    integers = {(True, True): "all", (True, False): "head", (False, True): "verifier"}
    named = {
        "verifier": s.verifier, "shape": s.shape, "head": s.head, "target": "cuda",
        "precision": s.precision, "int8": integers.get((form.int8, plans.engine.int8)),
        "draft-mode" if greedy else "proposal": form.draft, "batch": s.batch, "gpu": s.gpu,
        "max-seq": s.max_seq, "window": s.window, "step": s.frontend.get("step"),
    }  # fmt: skip
    for name, value in named.items():
        words += [] if value is None else [f"--{name}", str(value)]
    for bias in s.frontend.get("hmm_bias", ()):
        words += ["--hmm-bias", str(bias)]
    return shlex.join([*words, "-o", "best.pcc"])


def show(r: Ranking, subject: str, commands: Mapping[str, str]) -> None:
    """Print the forms, the pick, and what would change it."""
    gpu = r["gpu"]
    parts = list(r["forms"][0]["parts"])
    columns = ["form", "ms", *parts, "GB", "of the bound", "accepted", "tokens/s", "break-even"]
    table(
        f"{subject}, context {r['context']}: predicted for {gpu['arch']} with "
        f"{gpu['multiprocessors']} multiprocessors, copies at {gpu['copy_tb_s']:.3g} TB/s "
        f"({gpu['copy_from']})",
        columns, [_line(f, r["n"]) for f in r["forms"]],
    )  # fmt: skip
    if r["pick"] is None:
        print("no pick: say how many drafts are accepted, --accepted FORM=A for each form")
    else:
        best, second = r["forms"][:2]
        lead = 100 * (r["lead"] or 0.0)
        print(f"pick: {best['form']}, {best['tokens_per_second']:.0f} tokens/s, {lead:.1f} % more "
              f"than {second['form']}")  # fmt: skip
        for f in r["forms"]:
            if said := _change(f, best, r["n"]):
                print(f"  {said}")
        if best["form"] in commands:
            print(printable(f"  {commands[best['form']]}"))
    for remark in r["remarks"]:
        print(f"note: {remark}")


def _line(f: Priced, n: int) -> list[str]:
    accepted, rate, even = f["accepted"], f["tokens_per_second"], f["break_even"]
    return [
        f["form"], f"{f['ms']:.3f}", *(f"{v:.3f}" for v in f["parts"].values()),
        f"{sum(f['bytes_moved'].values()) / 1e9:.2f}", f"{f['ratio_to_bound']:.2f}",
        "-" if accepted is None else f"{accepted:.2f}", "-" if rate is None else f"{rate:.0f}",
        "-" if even is None else "never" if even > n - 1 else f"{even:.2f}",
    ]  # fmt: skip


def _change(f: Priced, best: Priced, n: int) -> str:
    """Return what would have to be accepted for another pick."""
    even = f["break_even"]
    if even is None:
        return ""
    if f is best:
        return f"it stays so while more than {max(0.0, even):.2f} drafts of a round are accepted"
    if even > n - 1:
        return f"{f['form']} would not be faster if all {n - 1} drafts were accepted"
    return f"{f['form']} would be as fast at {even:.2f} accepted drafts"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(choose)
