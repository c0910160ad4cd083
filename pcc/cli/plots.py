"""Plots, where people would rather look. matplotlib is an optional extra."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from pcc.errors import PccError

INK, PALE, ACCENT = "#222222", "#b8b8b8", "#2a6f97"


def figure(columns: int) -> tuple[Any, Any]:
    """Return a matplotlib figure without a display, and its axes."""
    try:
        import matplotlib
    except ImportError:
        raise PccError(
            "X220", "matplotlib is not installed", hint="pip install 'pcc[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(1, columns, figsize=(4.6 * columns, 3.4), squeeze=False)
    for a in axes[0]:
        a.spines[["top", "right"]].set_visible(False)
    return made, axes[0]


def save(made: Any, path: Path) -> None:
    """Write a figure whole or not at all."""
    from matplotlib import pyplot

    from pcc.circuit.text import write

    kind = path.suffix.lstrip(".").lower()
    if kind not in ("svg", "png"):
        raise PccError(
            "C133", f"cannot write a {path.suffix or 'nameless'} plot", hint=".svg, .png"
        )
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
