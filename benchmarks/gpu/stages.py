"""What is run on a GPU machine, as data: stages of commands with time limits.

`{work}` is a folder for bundles, `{json}` the file that a command writes its rows or report to,
`{root}` the checkout, `{checkpoints}` what `checkpoints.py` wrote: published heads and verifiers.
`python` says whose interpreter runs a command: "system" (torch, cuda-bindings), "ort" (the same
with onnxruntime-gpu on its path) or "trt" (Python 3.11 with TensorRT 8.6; neither torch nor
onnxruntime).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One program: arguments after the interpreter, seconds that it may take, what it writes."""

    name: str
    args: tuple[str, ...]
    seconds: int
    python: str = "system"
    writes: str = ""  # "rows", "row" or "report": what is in {json}


@dataclass(frozen=True)
class Stage:
    """Commands that belong together; one that fails does not stop those after it."""

    name: str
    commands: tuple[Command, ...]


PCC = ("-m", "pcc.cli")
HEADS = {"evabyte-6.5b": (16, 32), "byte-llama-3.2-3b": (8, 32)}
CONTEXTS = {"evabyte-6.5b": (1024, 8192), "byte-llama-3.2-3b": (1024, 8192)}
MAX_SEQ = 8704  # the longest context, and a window more


def conformance(name: str, python: str, seconds: int, *options: str) -> Command:
    """Return a run of the suite."""
    args = (*PCC, "conformance", *options, "--jobs", "8", "--json", "{json}")
    return Command(name, args, seconds, python, "report")


def engine(
    shape: str, head: str, target: str, precision: str, python: str,
    *, batch: int = 1, max_seq: int = MAX_SEQ, contexts: tuple[int, ...] = (), n: int = 0,
    how: tuple[str, ...] = (), seconds: int = 400, form: str = "",
) -> Stage:  # fmt: skip
    """Return a stage that compiles a shape, times it, and removes the bundle.

    `precision` "bf16+int8": the matrices of head and verifier as 8-bit integers. `how`: options of
    `pcc compile` beside these, `form`: their name; `seconds`: what it may take.
    """
    half, _, integers = precision.partition("+")
    usual, r = HEADS[shape]
    title = f"{target}-{shape}-{head}{n or ''}-{precision}-b{batch}{form and '-' + form}"
    n = n or usual
    bundle = f"{{work}}/{title}.pcc"
    size = f"{head},n={n}" + ("" if head == "ff" else f",r={r}")
    made = (
        *PCC, "compile", "--shape", shape, "--head", size, "--target", target,
        "--precision", half, "--batch", str(batch), "--max-seq", str(max_seq),
        "--no-validate", "--query", "draft", "--force", "-o", bundle,
        *(("--int8", "all") if integers else ()), *how,
    )  # fmt: skip
    provider = "tensorrt" if target.startswith("tensorrt") else "cuda"
    timed = [*PCC, "bench", bundle, "--gpu", "--provider", provider, "--shape", shape]
    for c in contexts or CONTEXTS[shape]:
        timed += ["--context", str(c)]
    timed += ["--json-out", "{json}"]
    gap = ("{root}/benchmarks/gpu/host_gap.py", bundle, "--out", "{json}")
    kernels = ("{root}/benchmarks/gpu/device_kernels.py", bundle, "--out", "{json}")
    plain = batch == 1 and not form and not integers
    return Stage(title, (
        Command("compile", made, seconds, python),
        Command("bench", tuple(timed), 180, python, "rows"),
        *((Command("host-gap", gap, 60, python, "report"),) if plain and target == "cuda" else ()),
        *(
            (Command("device-kernels", kernels, 60, python, "report"),)
            if target == "onnx-cuda"  # of pcc's own engine the row has its parts
            else ()
        ),
        Command("remove", ("-c", f"import shutil; shutil.rmtree(r'{bundle}')"), 60, python),
    ))  # fmt: skip


def yardstick(shape: str, head: str, precision: str, context: int, batch: int = 1) -> Command:
    """Return the whole round in plain torch."""
    n, r = HEADS[shape]
    args = (
        "{root}/benchmarks/gpu/torch_round.py", "--shape", shape, "--head", head, "--n", str(n),
        "--r", str(r), "--precision", precision, "--context", str(context), "--batch", str(batch),
        "--json", "{json}",
    )  # fmt: skip
    return Command(f"torch-{shape}-{head}-{context}-b{batch}", args, 90, "system", "row")


def suite(name: str, python: str, how: tuple[str, ...], texts: tuple[str, ...] = ()) -> Stage:
    """Return the runs of the suite that a backend takes, a part at a time.

    `texts`: where the texts of the suite's own verifiers are, if nothing there makes them.
    """
    one = ("--batch", "1")
    return Stage(f"conformance-{name}", (
        conformance(f"{name}-texts", python, 240, *how, *texts, "--part", "protocol"),
        conformance(f"{name}-checkpoints", python, 240, *how, *PUBLISHED),
        conformance(f"{name}-queries", python, 240, *how, "--part", "queries"),
        conformance(f"{name}-queries-fp16", python, 240, *how, "--part", "queries", *one,
                    "--precision", "fp16"),
        conformance(f"{name}-queries-bf16", python, 240, *how, "--part", "queries", *one,
                    "--precision", "bf16"),
        conformance(f"{name}-ops", python, 240, *how, "--part", "ops",
                    "--half", "f16", "--half", "bf16"),
        conformance(f"{name}-texts-fp16", python, 240, *how, *texts, "--part", "protocol", *one,
                    "--precision", "fp16"),
        conformance(f"{name}-texts-bf16", python, 300, *how, *texts, "--part", "protocol",
                    "--precision", "bf16"),
    ))  # fmt: skip


TORCH = tuple(
    yardstick(shape, head, "bf16", context)
    for shape, heads in (
        ("evabyte-6.5b", ("btree", "hmm", "cp")),
        ("byte-llama-3.2-3b", ("btree",)),
    )
    for head in heads
    for context in (CONTEXTS[shape] if head == "btree" else (1024,))
)
# The published checkpoints in fp32, and the texts that a CPU makes of them.
PUBLISHED = ("--part", "protocol", "--checkpoints", "{checkpoints}",
             "--expected", "{checkpoints}/expected.json")  # fmt: skip
EXPECTED = ("--expected", "{root}/{expected}")
CUDA = ("--target", "cuda", "--provider", "cuda", "--jobs", "8")
ORT = ("--target", "onnx-cuda", "--provider", "cuda", "--jobs", "4")
# Quick builds: tactics decide about time, not about results.
TENSORRT = ("--target", "tensorrt", "--provider", "tensorrt", "--batch", "1")
QUICK, QUICKEST = ("--engine", "level=1"), ("--engine", "level=0")
# What texts are made with: each graph of a bundle is an engine that takes long to build.
ROUNDS = ("--engine", "only=step,step_greedy,prefill,prefill_greedy")


# Each engine of a pass has a copy of the weights: on the disk, in memory while it is built, on the
# device. With prompts read n tokens at a time rounds and prompts share one pass of one width. All
# layers of a pass are one fused block, which takes long to compile; engines of two layers each are
# built side by side. In fp32, the only precision of verifiers that 8.6 builds and pcc accepts;
# EvaByte's 26 GB, once as graphs and once as plans, are more than the machine's disk holds.
def one_pass(n: int) -> tuple[str, ...]:
    """Return the options of a build of what a round needs, and no more."""
    options = ("profiles=yes", "only=step", "level=1", "layers=2", "jobs=8")
    return ("--chunk", str(n), *(x for each in options for x in ("--engine", each)))


STAGES = (
    Stage("environment", (
        Command("environment", ("{root}/benchmarks/gpu/environment.py", "{json}"), 60,
                "system", "report"),
    )),
    Stage("tests", (
        Command("tests", ("{root}/tests/proof.py", "--out", "{json}", "-rs", "-p",
                          "no:cacheprovider", "tests/gpu"), 480, "system", "report"),
    )),
    Stage("kernels", (
        Command("kernels", ("{root}/benchmarks/gpu/kernels.py", "--out", "{json}"), 300,
                "system", "report"),
    )),
    suite("cuda", "system", CUDA, EXPECTED),
    suite("ort", "ort", ORT),
    # TensorRT builds an engine for each graph: a part of the suite at a time. Engines of a command
    # are built side by side, and judged as they are ready; the report is written as they are.
    Stage("conformance-tensorrt", (
        conformance("trt-ops", "trt", 420, *TENSORRT, *QUICKEST, "--part", "ops", "--half", "f16"),
        conformance("trt-texts", "trt", 420, *TENSORRT, *QUICK, *ROUNDS, "--part", "protocol",
                    *EXPECTED),
        conformance("trt-checkpoints", "trt", 420, *TENSORRT, *QUICK, *ROUNDS, *PUBLISHED),
        conformance("trt-queries", "trt", 420, *TENSORRT, *QUICK, "--part", "queries"),
        conformance("trt-queries-fp16", "trt", 420, *TENSORRT, *QUICK, "--part", "queries",
                    "--precision", "fp16"),
        conformance("trt-texts-fp16", "trt", 420, *TENSORRT, *QUICK, *ROUNDS,
                    "--part", "protocol", "--precision", "fp16", *EXPECTED),
    )),
    Stage("drafts", (
        Command("drafts", ("{root}/benchmarks/gpu/drafts.py", "--json", "{json}"), 300,
                "system", "rows"),
    )),
    Stage("torch", TORCH),
    engine("evabyte-6.5b", "btree", "cuda", "bf16", "system"),
    engine("byte-llama-3.2-3b", "btree", "cuda", "bf16", "system"),
    engine("evabyte-6.5b", "btree", "cuda", "bf16+int8", "system"),
    *(  # forms of one head: what `pcc choose` picks from
        engine("evabyte-6.5b", "btree", "cuda", "bf16", "system", contexts=(1024,), how=how,
               form=form)
        for form, how in (
            ("latent-first", ("--proposal", "latent-first")), ("int8-head", ("--int8", "head")),
        )
    ),
    engine("byte-llama-3.2-3b", "btree", "cuda", "bf16+int8", "system"),
    engine("evabyte-6.5b", "btree", "onnx-cuda", "fp16", "ort", max_seq=2048, contexts=(1024,)),
    engine("byte-llama-3.2-3b", "btree", "onnx-cuda", "fp16", "ort", max_seq=2048,
           contexts=(1024,)),
    engine("evabyte-6.5b", "hmm", "cuda", "bf16", "system", contexts=(1024,)),
    engine("evabyte-6.5b", "cp", "cuda", "bf16", "system", contexts=(1024,)),
    engine("byte-llama-3.2-3b", "btree", "tensorrt", "fp32", "trt", max_seq=2048, contexts=(1024,),
           how=one_pass(8), seconds=900),
    *(  # the same window for each circuit, beside the smaller verifier
        engine("byte-llama-3.2-3b", head, "cuda", "bf16", "system", contexts=(1024,), n=16)
        for head in ("cp", "btree", "hmm")
    ),
    *(
        engine("byte-llama-3.2-3b", "btree", "cuda", "bf16", "system", batch=b, max_seq=16896,
               contexts=(1024, 4096, 16384))
        for b in (4, 16)
    ),
)  # fmt: skip
