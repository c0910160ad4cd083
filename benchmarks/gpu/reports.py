"""What GPU runs report beside rows and conformance: the machine, the host, TensorRT's parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks import markdown

Report = dict[str, Any]
KEPT = ("case", "what", "verdict", "error", "bound", "note")  # of a finding that is not plainly ok


def machines(old: list[Report], parts: list[Report]) -> list[Report]:
    """Return the newest environment of each GPU: driver, clocks, versions."""
    found = {_gpu(r): r for r in old}
    for e in parts:
        if e["stage"] == "environment" and "data" in e:
            found[_gpu(e["data"])] = {"commit": e["commit"], **e["data"]}
    return [found[k] for k in sorted(found)]


def _gpu(report: Report) -> str:
    return str(report["gpu"]).partition(",")[0]


def card(r: Report) -> str:
    """Return the GPU of a row or a report without its maker."""
    return str(r["gpu"]).removeprefix("NVIDIA ")


def host(old: list[Report], parts: list[Report]) -> list[Report]:
    """Return the newest gaps of each stage's bundle (`host_gap.py`)."""
    found = {(r["name"], r["gpu"]): r for r in old}
    for e in parts:
        if e["name"] == "host-gap" and "data" in e:
            made = {"name": e["stage"], "commit": e["commit"], "date": e.get("date"), **e["data"]}
            found[made["name"], made["gpu"]] = made
    return [found[k] for k in sorted(found)]


def gaps(found: list[Report]) -> str:
    """Return the gaps as Markdown, in microseconds a round."""
    columns = ("bundle", "rounds launched ahead", "draws", "rounds", "between launches",
               "beside the graph alone", "GPU")  # fmt: skip
    return markdown.table(columns, (
        (r["name"], "yes" if x["ahead"] else "no", "none" if x["greedy"] else "sampled",
         str(x["rounds"]), f"{x['gap_us']['p50']:.1f}", f"{x['beside_us']:.1f}",
         card(r))
        for r in found for x in r["rows"]
    ))  # fmt: skip


def traces(old: list[Report], parts: list[Report]) -> list[Report]:
    """Return the newest trace of each stage's bundle (`device_kernels.py`)."""
    found = {(r["name"], r["gpu"]): r for r in old}
    for e in parts:
        if e["name"] == "device-kernels" and "data" in e:
            data = {k: v for k, v in e["data"].items() if k != "bundle"}
            made = {"name": e["stage"], "commit": e["commit"], "date": e.get("date"), **data}
            found[made["name"], made["gpu"]] = made
    return [found[k] for k in sorted(found)]


def families(found: list[Report]) -> str:
    """Return the traces as Markdown: what kinds of kernels a round is made of."""
    columns = ("bundle", "kernels", "launches", "microseconds", "of the round", "GPU")
    rows = []
    for r in found:
        for x in r["families"]:
            rows.append((r["name"], x["family"], str(x["launches"]), f"{x['us']:.0f}",
                         f"{x['of_round']:.1%}", card(r)))  # fmt: skip
        part = r["between_us"] / r["round_us"]
        rows.append((r["name"], "between them", "", f"{r['between_us']:.0f}", f"{part:.1%}",
                     card(r)))  # fmt: skip
    return markdown.table(columns, rows)


def builds(parts: list[Report]) -> dict[tuple[str, str], float]:
    """Return the seconds that each stage's bundle took to compile, by stage and commit."""
    return {
        (e["stage"], e["commit"]): e["seconds"]
        for e in parts
        if e["name"] == "compile" and not e["status"]
    }


def tested(old: Report, parts: list[Report]) -> Report:
    """Return the newest report of `tests/gpu`: counts by file, and each test that did not pass."""
    for e in parts:
        if e["stage"] == "tests" and "data" in e:
            data = e["data"]
            old = {"commit": e["commit"], "ended": e["status"], "seconds": e["seconds"]}
            old |= {k: data[k] for k in ("date", "complete", "files", "not_run")}
            old["not_passed"] = {k: v.get("reason", "") for k, v in data["proofs"].items()
                                 if v["outcome"] != "passed"}  # fmt: skip
    return old


def checked(old: Report, reports: list[Mapping[str, Any]], commit: str) -> Report:
    """Return the parts of `tensorrt_check.py`, newest of each name, with what is not plainly ok."""
    runs = {r["part"]: r for r in old["runs"]}
    for report in reports:
        for part, of in report.items():
            runs[part] = {
                "part": part, "commit": commit, "ended": of["ended"],
                "failed": of.get("failed", ""), "seconds": of.get("seconds"),
                "verdicts": dict(Counter(r["verdict"] for r in of["rows"])),
                "not_ok": [
                    {k: r[k] for k in KEPT if k in r}
                    for r in of["rows"] if r["verdict"] not in ("ok", "skipped")
                ],
            }  # fmt: skip
    return {**old, "runs": [runs[k] for k in sorted(runs)]}
