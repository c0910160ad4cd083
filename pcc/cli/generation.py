"""`pcc run` and `pcc bench`: text from an engine, and what it costs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pcc
from pcc.cli import plots
from pcc.cli.bench_gpu import Asked, bench_gpu, checked, refuse_unused
from pcc.cli.bundles import Bundle, Provider, Threads
from pcc.cli.named import named
from pcc.cli.output import Json, emit, progress, say, table
from pcc.errors import PccError
from pcc.files import read_bounded
from pcc.knobs import MAX_PROMPT_BYTES
from pcc.prompts import read as read_prompts


def run(
    bundle: Bundle,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File to go on from.")] = None,
    max_new_bytes: Annotated[int, typer.Option(min=0, help="Bytes to generate.")] = 256,
    greedy: Annotated[bool, typer.Option(help="The verifier's argmax at every byte.")] = False,
    temperature: Annotated[float, typer.Option(help="0 means greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the verifier; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    draft_temperature: Annotated[float, typer.Option(help="Changes speed, not the law.")] = 1.0,
    draft_top_p: Annotated[float, typer.Option(help="Changes speed, not the law.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the uniforms.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string (repeatable).")] = None,
    bos: Annotated[bool, typer.Option(help="Put BOS in front, where the model has one.")] = True,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the chat template.")] = False,
    stats: Annotated[bool, typer.Option(help="Print statistics on stderr.")] = False,
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text: bytes stream to stdout as they are made, never half a character."""
    data = _prompt(prompt, prompt_file)
    engine = pcc.load(bundle, provider=provider, threads=threads, progress=progress)
    if chat:
        from pcc.runtime.chat import apply_template

        data, first = apply_template(engine, data)
        bos = bos and first
    session = engine.session(
        seed=seed, temperature=temperature, top_p=top_p, top_k=top_k, greedy=greedy,
        draft_temperature=draft_temperature, draft_top_p=draft_top_p,
    )  # fmt: skip
    if stats:
        tokens = len(session.vocabulary.encode(data, bos=bos)) + max_new_bytes
        say(f"{'memory beside weights, MB':28} {session.memory(tokens) / 1e6:.4g}")
    if as_json:
        result = session.generate(data, max_new_bytes, stop or (), bos=bos, logprobs=True)
        emit({**vars(result), "text": result.text, "bytes": list(result.bytes)})
    else:
        _stream(session, data, max_new_bytes, stop or [], bos=bos)
    _remarks(session, stats=stats)


def _stream(session: Any, data: bytes, most: int, stop: list[str], *, bos: bool) -> None:
    """Write bytes to stdout as they are made; an interruption or an error loses none of them."""
    left = most
    try:
        for chunk in session.stream(data, most, stop, bos=bos):
            left -= len(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    except (KeyboardInterrupt, PccError) as e:
        if session.rows:  # what was withheld: a possible stop string, half a character
            sys.stdout.buffer.write(session.pending[0][:left])
            sys.stdout.buffer.flush()
        if isinstance(e, PccError):
            raise
        say("")
    if sys.stdout.isatty():
        print()


def _remarks(session: Any, *, stats: bool) -> None:
    """Say where a full buffer ended the text, and what it cost where that is asked."""
    if session.reasons == ["full"]:
        say(f"pcc: the text ends where the buffer of {session.max_seq} tokens is full "
            "(help: compile with a larger --max-seq)")  # fmt: skip
    if stats:
        for name, value in session.stats.items():
            say(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")


def _prompt(text: str | None, file: Path | None) -> bytes:
    if (text is None) == (file is None):
        raise PccError("C130", "give one of --prompt and --prompt-file")
    return text.encode("utf-8", "surrogateescape") if text is not None else _read(file)  # type: ignore[arg-type]


def _read(file: Path) -> bytes:
    try:
        return read_bounded(file, MAX_PROMPT_BYTES, "C131")
    except OSError as e:
        raise PccError("C131", f"cannot read it: {e.strerror}", at=str(file)) from None


Prompts = Annotated[Path | None, typer.Option(help="Prompts: a file (one a line) or a folder.")]
Also = Annotated[
    list[Path] | None, typer.Option(help="--gpu: another bundle, e.g. a batch (repeatable).")
]
Contexts = Annotated[
    list[int] | None, typer.Option(help="--gpu: tokens before the round (repeatable).")
]
Accepted = Annotated[
    float | None, typer.Option(min=0, help="--gpu: drafts accepted in a round, for rates.")
]


def bench(
    ctx: typer.Context,
    bundle: Bundle,
    prompts: Prompts = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens for each prompt.")] = 128,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to take.")] = 20,
    prompt_bytes: Annotated[int, typer.Option(min=1, help="Take at most this many bytes.")] = 512,
    repeats: Annotated[int, typer.Option(min=5, help="Runs of each graph alone.")] = 50,
    sampled: Annotated[bool, typer.Option(help="Measure sampling too (temperature 1).")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write a plot (.svg or .png).")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Time rounds beside their bytes.")] = False,
    also: Also = None,
    context: Contexts = None,
    accepted: Accepted = None,
    shape: Annotated[str, typer.Option(help="--gpu: what rows call the verifier.")] = "",
    json_out: Annotated[Path | None, typer.Option(help="--gpu: write the rows here.")] = None,
    provider: Provider = "cpu",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Compare speculative with autoregressive decoding; their greedy texts must be identical.

    With --gpu, time the graphs of a round against the bytes that they must move.
    """
    refuse_unused(named(ctx), gpu=gpu)
    if gpu:
        asked = Asked(
            (bundle, *(also or ())), "cuda" if provider == "cpu" else provider,
            checked(context or (), repeats), repeats, shape, accepted,
        )  # fmt: skip
        bench_gpu(asked, plot, json_out, as_json=as_json)
        return
    if prompts is None:
        raise PccError("C136", "give --prompts, or --gpu to time without a text")
    if plot is not None:
        plots.ready(plot)  # before minutes are spent on measuring
    texts = read_prompts(prompts, limit=limit, most=prompt_bytes, code="C132")
    engine = pcc.load(bundle, provider=provider, threads=threads)
    report = measure(engine, texts, max_new_tokens, repeats, sampled=sampled)
    _present(report, plot, as_json=as_json)
    faults = [d for d in report["greedy"]["differences"] if not d["near_tie"]]
    raise typer.Exit(1 if faults else 0)


def _present(report: dict[str, Any], plot: Path | None, *, as_json: bool) -> None:
    if plot is not None:
        plots.draw_bench(report, plot)
    if as_json:
        emit(report)
    else:
        show_bench(report)


def measure(
    engine: Any, prompts: list[bytes], count: int, repeats: int, *, sampled: bool
) -> dict[str, Any]:
    """Return the figures of `pcc bench`; times in ms, rates in bytes per second."""
    import statistics

    from pcc.runtime.measure import break_even, compare_greedy, graph_times, memory
    from pcc.runtime.vocabulary import Vocabulary

    vocabulary = Vocabulary.of(engine.manifest, int(engine.generation()["vocab"]))
    ids = [vocabulary.encode(p) for p in prompts]
    count = min(count, int(engine.generation()["max_seq"]) - max(map(len, ids)))
    greedy, stats = compare_greedy(engine, ids, count, progress)
    times = graph_times(engine, max(map(len, ids)) + count, repeats)
    speedups = sorted(greedy.speedups)
    report: dict[str, Any] = {
        "bundle": str(engine.path), "prompts": len(ids), "tokens_per_prompt": count,
        "threads": engine.threads, "n": int(engine.generation()["n"]),
        "autoregressive": {"bytes_per_second": _rate(greedy.ar_tokens, greedy.ar_seconds)},
        "greedy": {
            "bytes_per_second": _rate(greedy.spec_tokens, greedy.spec_seconds),
            "bytes_per_round": stats.get("tokens_per_round"),
            "speedup_median": statistics.median(speedups) if speedups else None,
            "identical": greedy.identical, "near_ties": greedy.near_ties,
            "differences": greedy.differences, "stats": stats,
        },
        "graphs": times,
        "break_even_bytes_per_round": break_even(times),
    }  # fmt: skip
    # What rounds of the measured length would give if drafting and deciding cost nothing.
    bound = _rate(greedy.spec_tokens, stats.get("rounds", 0) * times["verify"]["p50_ms"] / 1e3)
    report["verify_only"] = {
        "bytes_per_second": bound, "bytes_per_round": report["greedy"]["bytes_per_round"],
    }  # fmt: skip
    if sampled:
        report["sampled"] = _sampled(engine, ids, count)
    state = engine.session(greedy=True).memory(max(map(len, ids)) + count)
    report["memory"] = memory(engine) | {"session": state}
    return report


def _sampled(engine: Any, prompts: list[list[int]], count: int) -> dict[str, Any]:
    from pcc.runtime.statistics import Statistics

    total: Statistics | None = None
    for k, p in enumerate(prompts):
        progress(f"sampling {k + 1} of {len(prompts)}")
        session = engine.session(seed=k)
        session.generate_ids(p, count)
        s = session.rounds.statistics
        total = s if total is None else total.plus(s)
    assert total is not None
    return {
        "bytes_per_second": _rate(total.emitted, total.round_seconds),
        "bytes_per_round": total.summary()["tokens_per_round"],
        "stats": total.summary(),
    }


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 and count else None


def show_bench(r: dict[str, Any]) -> None:
    """Print the figures as tables."""

    def number(v: Any, form: str) -> str:
        return "-" if v is None else format(v, form)

    ar = r["autoregressive"]["bytes_per_second"]
    rows = [["autoregressive, greedy", number(ar, ".1f"), "1.00", "1.00", ""]]
    for name, title in (("greedy", "speculative, greedy"), ("sampled", "speculative, sampled"),
                        ("verify_only", "verify only, as long rounds")):  # fmt: skip
        if name not in r:
            continue
        rate = r[name]["bytes_per_second"]
        ratio = rate / ar if rate and ar else None
        same = f"{r['greedy']['identical']}/{r['prompts']} identical" if name == "greedy" else ""
        rows.append([title, number(rate, ".1f"), number(ratio, ".2f"),
                     number(r[name]["bytes_per_round"], ".2f"), same])  # fmt: skip
    what = f"{r['prompts']} prompts, {r['tokens_per_prompt']} tokens each, n={r['n']}"
    table(f"{r['bundle']}: {what}",
          ["decoding", "bytes/s", "speed-up", "bytes/round", "output"], rows)  # fmt: skip
    parts = [[q, *(f"{t[k]:.3f}" for k in ("p50_ms", "p10_ms", "p90_ms"))]
             for q, t in r["graphs"].items()]  # fmt: skip
    table("graphs alone, batch 1", ["graph", "p50 ms", "p10", "p90"], parts)
    print(f"break-even: {number(r['break_even_bytes_per_round'], '.2f')} bytes per round")
    stats = r["greedy"]["stats"]
    hist, rounds = stats["acceptance_length_histogram"], max(1, stats["rounds"])
    bars = [[str(k), f"{100 * v / rounds:5.1f} %", "#" * round(40 * v / rounds)]
            for k, v in enumerate(hist)]  # fmt: skip
    table("accepted drafts per round, greedy", ["drafts", "rounds", ""], bars)
    print(f"host time per round: {stats['host_ms_per_round'] * 1e3:.0f} us")
    m = r["memory"]
    opened = ", ".join(f"{q} {v / 1e6:.1f}" for q, v in m["opened"].items())
    print(f"memory, MB: weight file {m['weights'] / 1e6:.1f}, a session {m['session'] / 1e6:.1f}; "
          f"added by opening a graph: {opened}")  # fmt: skip
    for d in r["greedy"]["differences"]:
        kind = "near-tie" if d["near_tie"] else "DIFFERENT TEXT"
        print(f"prompt {d['prompt']}, token {d['token']}: {kind}, logit gap {d['logit_gap']:.2e}")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(run)
    app.command()(bench)
