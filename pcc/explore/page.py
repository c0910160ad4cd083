"""index.html: one page without scripts or anything from elsewhere; every text is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pcc.explore.records import Interval, Line, Report
from pcc.explore.report import PLAIN, decoding
from pcc.explore.scatter import Mark, scatter

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:64rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
code{background:#f3f3f3;padding:.1em .3em;overflow-wrap:anywhere}
.scroll{overflow-x:auto}.scroll:focus,a:focus{outline:3px solid #2a6f97;outline-offset:2px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
caption{text-align:left;padding:.3rem 0}
th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th[scope=row],th:first-child,td.text{text-align:left}td.text{white-space:normal}
tr.front th{font-weight:700}tr:not(.front) th[scope=row]{font-weight:400}
tr:target{background:#fff3c4}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#222}
.note{color:#555;font-size:.9rem}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
COLUMNS = ("point", "front", "bytes per round", "ms per round", "bytes/s", "ms per byte",
           "speed-up", "same text")  # fmt: skip
HELP = (
    "A round is one pass of the verifier over a window of drafts. Higher is more bytes from one "
    "round, further left is less time for it. Above the dashed line drafting is faster than one "
    "byte at a time. The stepped line is the Pareto front: no other point gives as many bytes "
    "in as little time. Bars are 95 % intervals over prompts."
)


def page(r: Report) -> str:
    """Return the page of a report."""
    parts = [_part(r, mode) for mode in r["modes"]]
    failed = [x for x in r["points"] if x["status"] != "ok"]
    machine = ", ".join(str(v) for v in r["machine"].values() if v)
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    known = {str(k): str(v) for k, v in r["prompts"].items()}
    state = "" if r["complete"] else "<p><strong>Interrupted: some points are missing.</strong></p>"
    body = f"""<h1>Circuits to draft with</h1>{state}
<p>Verifier <code>{text(r["verifier"])}</code>; prompts <code>{text(known.get("path"))}</code>.</p>
<p class="note">{text(HELP)}</p>
{"".join(parts)}{_failures(failed)}{_lacking(r["missing"])}
<h2>Where this was measured</h2>
<p>{text(machine)}<br>{text(versions)}</p>
<p>Autoregressive time per byte, measured beside every point, varied by {100 * r["drift"]:.0f} %.
Times per round of two points that differ by less say little; speed-ups are side by side.</p>"""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pcc explore</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body>"
        "</html>\n"
    )


def text(value: object) -> str:
    """Return a value as escaped text; what cannot be printed becomes a question mark."""
    return html.escape("".join(c if c.isprintable() else "?" for c in str(value)))


def _part(r: Report, mode: str) -> str:
    """One mode: the choices, the plot and the table."""
    f = r["modes"][mode]
    marks = []
    rows = []
    plain = r["autoregressive"]
    if plain is not None:
        ms, on = plain["ms_per_round"], PLAIN in f["front"]
        one: Interval = {"value": 1.0, "low": None, "high": None}
        time: Interval = {"value": ms, "low": None, "high": None}
        marks.append(Mark(PLAIN, f"{mode}-plain", time, one, front=on, plain=True))
        rows.append(_row(f"{mode}-plain", PLAIN, on, ["1", f"{ms:.3g}", f"{1e3 / ms:.0f}" if ms else
                    "-", f"{ms:.3g}", "1", ""]))  # fmt: skip
    for i, line in enumerate(r["points"]):
        if (d := decoding(line, mode)) is None:
            continue
        name, on, at = line["point"]["name"], line["point"]["name"] in f["front"], f"{mode}-{i}"
        marks.append(Mark(name, at, d["ms_per_round"], d["bytes_per_round"], front=on))
        cells = [interval(d["bytes_per_round"]), interval(d["ms_per_round"]),
                 f"{d['bytes_per_second']:.0f}", f"{d['ms_per_byte']:.3g}", interval(d["speedup"]),
                 _same(line) if mode == "greedy" else ""]  # fmt: skip
        rows.append(_row(at, name, on, cells))
    head = "".join(f'<th scope="col">{c}</th>' for c in COLUMNS)
    return (
        f'<section><h2 id="{mode}">{mode.capitalize()}</h2>{_choices(r, mode)}'
        f"{scatter(marks, f'{mode}: bytes per round against milliseconds per round')}"
        f'<div class="scroll" role="region" aria-labelledby="{mode}-caption" tabindex="0"><table>'
        f'<caption id="{mode}-caption">All points, {mode}; those on the front in bold</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _row(at: str, name: str, on: bool, cells: Sequence[str]) -> str:
    mark = ' class="front"' if on else ""
    tail = "".join(f"<td>{text(c)}</td>" for c in ("yes" if on else "", *cells))
    return f'<tr id="{at}"{mark}><th scope="row">{text(name)}</th>{tail}</tr>'


def interval(v: Interval, form: str = ".3g") -> str:
    """Return a figure with its interval, if it has one."""
    if v["low"] is None or v["high"] is None:
        return format(v["value"], form)
    return f"{v['value']:{form}} ({v['low']:{form}} to {v['high']:{form}})"


def _same(line: Line) -> str:
    figures = line["figures"]
    if figures is None:
        return ""
    near = figures["sameness"]["near_ties"]
    more = f", {near} near-ties" if near else ""
    return f"{figures['sameness']['identical']}/{figures['prompts']}{more}"


def _choices(r: Report, mode: str) -> str:
    out = []
    f = r["modes"][mode]
    for title, c in (("Most bytes per second", f["best"]), ("Within the limit", f["within_limit"])):
        if c is None:
            continue
        most = f" (at most {c['limit']:.3g} ms per round)" if c["limit"] else ""
        how = f": <code>{text(c['command'])}</code>" if c["command"] else ""
        out.append(
            f"<li>{title}{most}: <strong>{text(c['name'])}</strong>, {c['bytes_per_second']:.0f} "
            f"bytes/s, {c['ms_per_round']:.3g} ms per round{how}</li>"
        )
    limit = r["target"].get("max_ms_per_round")
    if limit and f["within_limit"] is None:
        out.append(f"<li>No point takes at most {text(limit)} ms per round.</li>")
    return f"<ul>{''.join(out)}</ul>" if out else "<p>Nothing was measured.</p>"


def _failures(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    rows = []
    for line in lines:
        e = line["error"]
        why = (
            f"{e['code']}: {e['what']} {e['hint']}"
            if e
            else "greedy text differs: see " + _same(line)
        )
        rows.append(
            f'<tr><th scope="row">{text(line["point"]["name"])}</th>'
            f'<td class="text">{text(why)}</td></tr>'
        )
    return (
        '<section><h2 id="failed">Without figures, or with another text</h2>'
        '<div class="scroll" role="region" aria-labelledby="failed" tabindex="0"><table>'
        '<thead><tr><th scope="col">point</th><th scope="col">why</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _lacking(names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(names)
    return f"<p>Heads of the grid that were neither given nor trained: {text(listed)}.</p>"
