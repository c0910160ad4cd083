"""Plots, where people would rather look. matplotlib is an optional extra."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

from pcc.errors import PccError

INK, PALE, ACCENT = "#222222", "#b8b8b8", "#2a6f97"


def library() -> Any:
    """Return matplotlib. Errors: X220."""
    try:
        import matplotlib
    except ImportError:
        raise PccError(
            "X220", "matplotlib is not installed", hint="pip install 'pcc[plot]'"
        ) from None
    return matplotlib


def figure(columns: int) -> tuple[Any, Any]:
    """Return a matplotlib figure without a display, and its axes."""
    matplotlib = library()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(1, columns, figsize=(4.6 * columns, 3.4), squeeze=False)
    for a in axes[0]:
        a.spines[["top", "right"]].set_visible(False)
    return made, axes[0]


def check(path: Path) -> str:
    """Return the format that a file name asks for, which must be known. Errors: C133."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("svg", "png"):
        raise PccError(
            "C133", f"cannot write a {path.suffix or 'nameless'} plot", hint=".svg, .png"
        )
    return kind


def ready(path: Path) -> None:
    """Refuse, before anything is measured, what could not be drawn or written afterwards."""
    check(path)
    library()
    if not path.parent.is_dir():
        raise PccError("C134", "there is no such folder", at=str(path.parent))


def save(made: Any, path: Path) -> None:
    """Write a figure whole or not at all."""
    from matplotlib import pyplot

    from pcc.circuit.text import write

    kind = check(path)
    data = io.BytesIO()
    made.tight_layout()
    made.savefig(data, format=kind, dpi=150)
    pyplot.close(made)
    write(path, data.getvalue())


def draw_bench(r: dict[str, Any], path: Path) -> None:
    """Draw bytes per second, accepted drafts per round, and the time of each graph."""
    made, (speed, accepted, graphs) = figure(3)
    names, values = ["autoregressive"], [r["autoregressive"]["bytes_per_second"] or 0.0]
    for name in ("greedy", "sampled"):
        if name in r:
            names.append(name)
            values.append(r[name]["bytes_per_second"] or 0.0)
    bars = speed.bar(names, values, color=[PALE, ACCENT, ACCENT][: len(names)])
    speed.bar_label(bars, fmt="%.0f")
    speed.set_ylabel("bytes per second")
    hist = r["greedy"]["stats"]["acceptance_length_histogram"]
    total = max(1, sum(hist))
    accepted.bar(range(len(hist)), [v / total for v in hist], color=ACCENT)
    accepted.set_xlabel("accepted drafts in a round (greedy)")
    accepted.set_ylabel("share of rounds")
    times = [(q, t["p50_ms"]) for q, t in r["graphs"].items()]
    bars = graphs.barh([q for q, _ in times], [v for _, v in times], color=PALE)
    graphs.bar_label(bars, fmt="%.2f")
    graphs.set_xlabel("ms, batch 1, median")
    graphs.invert_yaxis()
    save(made, path)


def draw_gpu(rows: Any, path: Path) -> None:
    """Draw each round beside its bound, and rounds against the context for each batch size."""
    made, (rounds, contexts) = figure(2)
    names = [f"{r['shape']} {r['architecture']} b{r['batch']} c{r['context']}" for r in rows]
    bars = rounds.barh(names, [r["round_ms"] for r in rows], color=PALE, label="round")
    rounds.bar_label(bars, [f"{r['ratio_to_bound']:.2f}x" for r in rows], fontsize=7)
    rounds.barh(names, [r["bound_ms"] for r in rows], color=ACCENT, height=0.4, label="its bytes")
    rounds.set_xlabel("ms, median")
    rounds.tick_params(axis="y", labelsize=6)
    rounds.legend(fontsize=7)
    rounds.invert_yaxis()
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in rows:
        key = f"{r['shape']} {r['architecture']} batch {r['batch']}"
        lines.setdefault(key, []).append((r["context"], r["round_ms"]))
    for key, points in lines.items():
        contexts.plot(*zip(*sorted(points), strict=True), "o-", ms=4, label=key)
    contexts.set(xlabel="tokens before the round", ylabel="ms, median", ylim=(0, None))
    contexts.legend(fontsize=6)
    save(made, path)


SHADES = ("#2a6f97", "#61a5c2", "#a9d6e5", "#c9ada7", "#d9d9d9")


def draw_choice(r: Any, path: Path) -> None:
    """Draw each form's round by part beside its bound, and rates against accepted drafts."""
    made, (rounds, rates) = figure(2)
    names, left = [f["form"] for f in r["forms"]], [0.0] * len(r["forms"])
    for part, shade in zip(r["forms"][0]["parts"], SHADES, strict=True):
        widths = [f["parts"][part] for f in r["forms"]]
        rounds.barh(names, widths, left=left, color=shade, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    bounds = [f["bound_ms"] for f in r["forms"]]
    rounds.plot(bounds, names, "|", ms=14, color=INK, label="its bytes")
    rounds.set_xlabel("ms of a round, predicted")
    rounds.invert_yaxis()
    rounds.legend(
        fontsize=6, ncol=6, loc="lower center", bbox_to_anchor=(0.4, 1.0), columnspacing=1
    )
    for f, style in zip(r["forms"], itertools.cycle(("-", "--", "-.", ":"))):
        per_token = 1e3 * r["batch"] / f["ms"]
        tokens = 1 if f["break_even"] is None else r["n"]  # autoregressive: one, whatever stays
        ends = [per_token, per_token * tokens]
        rates.plot([0, r["n"] - 1], ends, style, label=f["form"])
        if f["tokens_per_second"] is not None:
            rates.plot(f["accepted"], f["tokens_per_second"], "o", ms=4, color=INK)
    rates.set(xlabel="accepted drafts in a round", ylabel="tokens per second", ylim=(0, None))
    rates.legend(fontsize=6)
    save(made, path)


def _bar(v: Any) -> Any:
    """Return how far an interval reaches below and above its figure, if there is one."""
    if v["low"] is None:
        return None
    return [[max(0.0, v["value"] - v["low"])], [max(0.0, v["high"] - v["value"])]]


def draw_explore(r: Any, path: Path) -> None:
    """Draw time per round against bytes per round, one panel a mode, with the Pareto front."""
    from pcc.explore.report import decoding

    made, panels = figure(len(r["modes"]))
    plain = r["autoregressive"]
    for axes, (mode, f) in zip(panels, r["modes"].items(), strict=True):
        at: dict[str, tuple[float, float]] = {}
        if plain is not None:
            at[plain["name"]] = (plain["ms_per_round"], 1.0)
            axes.axline((0, 0), at[plain["name"]], color=PALE, linestyle="--", linewidth=1)
            axes.plot(*at[plain["name"]], "o", color=INK, ms=5, zorder=3)
        for line in r["points"]:
            if (d := decoding(line, mode)) is None:
                continue
            name, size, time = line["point"]["name"], d["bytes_per_round"], d["ms_per_round"]
            at[name] = (time["value"], size["value"])
            bars = [_bar(v) for v in (time, size)]
            color = ACCENT if name in f["front"] else PALE
            axes.errorbar(*at[name], xerr=bars[0], yerr=bars[1], fmt="o", color=color, ms=5)
        front = [at[n] for n in f["front"] if n in at]
        axes.step(*zip(*front, strict=True) if front else ([], []), where="post", color=ACCENT)
        for name in f["front"]:
            shown = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
            axes.annotate(shown, at[name], (4, 4), textcoords="offset points",
                          fontsize=7, color=INK)  # fmt: skip
        axes.set(xlim=(0, None), ylim=(0, None), title=mode, xlabel="ms per round",
                 ylabel="bytes per round")  # fmt: skip
    save(made, path)
