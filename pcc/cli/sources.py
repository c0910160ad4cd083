"""`pcc compile`: from a source to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pcc
from pcc.cli.bundles import present
from pcc.cli.checkpoints import HmmBias, Step, reading
from pcc.cli.engine_options import engine_options
from pcc.cli.named import named
from pcc.cli.output import Json, progress
from pcc.knobs import DRAFT_MODE, PREFILL_CHUNK, PROPOSAL, SEED, SEQUENCE
from pcc.targets import TARGETS

if TYPE_CHECKING:
    pass

Source = Annotated[
    Path | None,
    typer.Argument(help="Checkpoint folder or .pcir file; none: the verifier's own heads."),
]
Precision = Annotated[str, typer.Option(help="Of large weights and caches: fp32, fp16 or bf16.")]
Int8 = Annotated[
    str | None, typer.Option(help="8-bit integers for matrices of: head, verifier or all.")
]
Architecture = Annotated[
    str | None,
    typer.Option(help="Build for this architecture, sm_90 or sm_89:142 (default: this GPU)."),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(help="Of a TensorRT build: NAME=VALUE (repeatable; docs/tensorrt.md)."),
]
Opset = Annotated[int | None, typer.Option(help="Of target onnx: 24, or 17 for older runtimes.")]
Verifier = Annotated[
    Path | None, typer.Option(help="Model folder (config.json, safetensors) that verifies.")
]
DraftMode = Annotated[
    str, typer.Option(help="Greedy drafts: stepwise, max-product or latent-first.")
]
Truncation = Annotated[
    bool | None,
    typer.Option(help="Settings that truncate drafts (default: where they are free)."),
]
Shape = Annotated[
    str | None,
    typer.Option(help="Random weights of a true shape for benchmarks, e.g. evabyte-6.5b."),
]
Head = Annotated[
    str | None, typer.Option(help="With --shape: KIND,n=N,r=R; KIND ff, cp, hmm or btree.")
]


def compile_command(
    ctx: typer.Context,
    source: Source = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle to write.")] = Path("m.pcc"),
    query: Annotated[list[str] | None, typer.Option(help="Only this query (repeatable).")] = None,
    target: Annotated[str, typer.Option(help=", ".join(TARGETS))] = "onnx",
    precision: Precision = "fp32",
    int8: Int8 = None,
    batch: Annotated[int, typer.Option(help="Rows of a call, where shapes are fixed.")] = 1,
    gpu: Architecture = None,
    engine: EngineOptions = None,
    opset: Opset = None,
    parameters: Annotated[str, typer.Option(help="context or logits")] = "context",
    verifier: Verifier = None,
    max_seq: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = SEQUENCE,
    chunk: Annotated[int, typer.Option(help="Prompt tokens read in one pass.")] = PREFILL_CHUNK,
    proposal: Annotated[str, typer.Option(help="full or latent-first")] = PROPOSAL,
    draft_mode: DraftMode = DRAFT_MODE,
    truncation: Truncation = None,
    window: Annotated[int | None, typer.Option(help="Draft fewer variables.")] = None,
    step: Step = None,
    hmm_bias: HmmBias = None,
    shape: Shape = None,
    head: Head = None,
    seed: Annotated[int, typer.Option(min=0, help="With --shape: of the weights.")] = SEED,
    force: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    validate: Annotated[bool, typer.Option(help="Check every pass.")] = True,
    as_json: Json = False,
) -> None:
    """Compile a circuit to a bundle: one graph for each query, over one weight file."""
    from pcc.arguments import refuse_unread

    random = shape is not None or head is not None
    refuse_unread(named(ctx), verifier=random or verifier is not None, shape=random)
    extra = reading(step, hmm_bias)
    if engine:
        extra["engine"] = engine_options(engine)
    artifact = pcc.compile(
        source, verifier=verifier, max_seq=max_seq, chunk=chunk, proposal=proposal,
        draft_mode=draft_mode, queries=query or None, out=out, target=target,
        precision=precision, int8=int8, batch=batch, gpu=gpu, truncation=truncation, opset=opset,
        parameters=parameters, window=window, force=force,
        validate=validate, progress=progress, shape=shape, head=head, seed=seed, **extra,
    )  # fmt: skip
    present(artifact, f"compiled in {artifact.seconds:.2f} s", as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("compile")(compile_command)
