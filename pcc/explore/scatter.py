"""A scatter plot as SVG text: time per round against bytes per round, with the Pareto front."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcc.explore.records import Interval

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 56, 24, 16, 48
INK, PALE, ACCENT = "#222222", "#8a8a8a", "#2a6f97"
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Mark:
    """One point of the plot, linked to the table row `row`."""

    name: str
    row: str
    ms: Interval
    bytes: Interval
    front: bool
    plain: bool = False


def ticks(most: float, count: int = 6) -> list[float]:
    """Return round numbers from 0 to beyond `most`."""
    raw = max(most, 1e-9) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(f for f in (1, 2, 5, 10) if f * unit >= raw * (1 - 1e-9)) * unit
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]


def scatter(marks: Sequence[Mark], title: str) -> str:
    """Return the plot; each point is a link that the keyboard reaches, with its figures as name."""
    if not marks:
        return ""
    xs, ys = (ticks(1.05 * max(map(_high, part))) for part in
              ([m.ms for m in marks], [m.bytes for m in marks]))  # fmt: skip

    def x(v: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * v / xs[-1]

    def y(v: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * v / ys[-1]

    parts = [_axes(xs, ys, x, y), _break_even(marks, xs[-1], ys[-1], x, y), _front(marks, x, y)]
    parts += [_mark(m, x, y) for m in sorted(marks, key=lambda m: m.front)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _high(v: Interval) -> float:
    return v["value"] if v["high"] is None else v["high"]


def _axes(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    out = []
    for v in xs:
        at = f"{x(v):.1f}"
        out.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{y(0):.1f}" stroke="#eee"/>')
        out.append(f'<text x="{at}" y="{y(0) + 18:.1f}" text-anchor="middle">{v:.4g}</text>')
    for v in ys:
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"'
        out.append(f'<line {ends} stroke="#eee"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>')
    middle = f'text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}"'
    out.append(f"<text {middle}>milliseconds per round</text>")
    side = f'text-anchor="middle" x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})"'
    out.append(f"<text {side}>bytes per round</text>")
    return f'<g aria-hidden="true">{"".join(out)}</g>'


def _break_even(marks: Sequence[Mark], right: float, top: float, x: Scale, y: Scale) -> str:
    """The line bytes = ms / (ms of one autoregressive byte), as far as the frame goes."""
    plain = next((m.ms["value"] for m in marks if m.plain), 0.0)
    if plain <= 0:
        return ""
    end = min(right, top * plain)
    return (f'<line x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(end):.1f}" y2="{y(end / plain):.1f}" '
            f'stroke="{PALE}" stroke-dasharray="5 4"/>')  # fmt: skip


def _front(marks: Sequence[Mark], x: Scale, y: Scale) -> str:
    on = sorted((m.ms["value"], m.bytes["value"]) for m in marks if m.front)
    if not on:
        return ""
    path = f"M{x(on[0][0]):.1f} {y(on[0][1]):.1f}"
    path += "".join(f"H{x(a):.1f}V{y(b):.1f}" for a, b in on[1:])
    return f'<path d="{path}" fill="none" stroke="{ACCENT}" stroke-width="1.5"/>'


def _mark(m: Mark, x: Scale, y: Scale) -> str:
    a, b = m.ms, m.bytes
    name = "".join(c if c.isprintable() else "?" for c in m.name)
    told = html.escape(f"{name}: {b['value']:.3g} bytes in {a['value']:.3g} ms")
    color = INK if m.plain else ACCENT if m.front else PALE
    px, py, bars = x(a["value"]), y(b["value"]), ""
    for low, high, across in ((a["low"], a["high"], True), (b["low"], b["high"], False)):
        if low is None or high is None:
            continue
        ends = (x(low), x(high), py, py) if across else (px, px, y(low), y(high))
        bars += '<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" '.format(*ends)
        bars += f'stroke="{color}" opacity="0.6"/>'
    label = ""
    if m.front:
        shift, anchor = (-9, "end") if px > WIDTH * 0.7 else (9, "start")
        at = f'x="{px + shift:.1f}" y="{py - 7:.1f}" text-anchor="{anchor}"'
        label = f'<text {at} aria-hidden="true">{html.escape(name[:40])}</text>'
    return (f'<a href="#{m.row}" aria-label="{told}">{bars}<circle cx="{px:.1f}" cy="{py:.1f}" '
            f'r="5" fill="{color}"><title>{told}</title></circle>{label}</a>')  # fmt: skip
