"""Result lines on the disk, and the page and the report made of them: no engine is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pcc.errors import PccError
from pcc.explore import Config
from pcc.explore.page import page, text
from pcc.explore.points import Point
from pcc.explore.records import SCHEMA, Decoding, Figures, Interval, Line, Report, conforms
from pcc.explore.report import PLAIN, report
from pcc.explore.results import Results, exclusive, key_of
from pcc.explore.scatter import Mark, scatter

HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202e\n</title>{#}"
CONTEXT = {"prompts": "p", "versions": {"pcc": "1"}, "machine": {"processor": HOSTILE}}


def interval(v: float) -> Interval:
    return {"value": v, "low": v * 0.9, "high": v * 1.1}


def decoding(ms: float, size: float) -> Decoding:
    return {
        "bytes_per_round": interval(size), "ms_per_round": interval(ms),
        "bytes_per_second": 1e3 * size / ms, "ms_per_byte": ms / size, "speedup": interval(1.5),
        "rounds": 10, "emitted": 30, "accepted_drafts": [1, 9],
    }  # fmt: skip


def line(name: str, ms: float = 2.0, size: float = 3.0, status: str = "ok") -> Line:
    figures: Figures = {
        "prompts": 3, "tokens": 9, "compile_seconds": 1.0,
        "autoregressive_ms_per_byte": interval(1.0), "greedy": decoding(ms, size),
        "sampled": decoding(ms, size / 2),
        "sameness": {"identical": 3, "near_ties": 0, "different": 0}, "graph_ms": {"decode": 0.5},
    }  # fmt: skip
    failed = status == "failed"
    return {
        "schema": SCHEMA, "key": f"key of {name}", "time": "now", "status": status,
        "point": Point(name, "cp", 4, 2, 0).where(), "figures": None if failed else figures,
        "error": {"code": "E1", "what": HOSTILE, "at": "", "hint": ""} if failed else None,
    }  # fmt: skip


@pytest.fixture
def make(config: Callable[..., Config], tmp_path: Path) -> Callable[..., Report]:
    def make(*lines: Line, **target: Any) -> Report:
        c = config(tmp_path, target=target)
        return report(c, lines, CONTEXT, {}, [HOSTILE], complete=True)

    return make


# ---------------------------------------------------------------- lines


def test_lines_are_kept_and_the_newest_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    r = Results(path)
    r.add(line("a", status="failed"))
    assert not r.finished("key of a")
    r.add(line("b"))
    r.add(line("a", size=2.5))
    again = Results(path)
    assert again.lines == r.lines
    assert again.finished("key of a")
    assert again.finished("key of b")
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 40, -30, -1])
def test_a_torn_line_does_not_count_nor_spoil_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).add(line("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b"key of a", b"key of b")[:cut])
    r = Results(path)
    complete = cut == -1  # all but the line feed
    assert (set(r.lines), r.ignored) == (
        ({"key of a", "key of b"}, 0) if complete else ({"key of a"}, 1)
    )
    r.add(line("c"))
    assert {"key of a", "key of c"} <= set(Results(path).lines)


@pytest.mark.parametrize(
    "bad",
    [
        b"[" * 100_000, b"\xff\xfe", b"null", b"{}", b'{"schema": 1}',
        json.dumps({**line("a"), "schema": 1}).encode(),
        json.dumps({**line("a"), "status": "fine"}).encode(),
        json.dumps({**line("a"), "figures": None}).encode(),
        json.dumps({**line("a"), "more": 1}).encode(),
        json.dumps({**line("a"), "point": {"name": 3}}).encode(),
        json.dumps(line("a", size=float("nan"))).encode(),
    ],
)  # fmt: skip
def test_other_data_are_no_lines(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(bad + b"\n" + json.dumps(line("good")).encode() + b"\n")
    r = Results(path)
    assert (set(r.lines), r.ignored) == ({"key of good"}, 1)


def test_a_full_disk_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = Results(tmp_path / "results.jsonl")
    r.add(line("a"))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
    with pytest.raises(PccError, match="G104"):
        r.add(line("b"))
    monkeypatch.undo()
    r.add(line("c"))
    assert set(Results(r.path).lines) == {"key of a", "key of c"}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(PccError, match="G105"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_keys_depend_on_every_part() -> None:
    a = key_of({"n": 4, "r": 2}, {"x": 1})
    assert a == key_of({"r": 2, "n": 4}, {"x": 1})
    assert len({a, key_of({"n": 4, "r": 3}, {"x": 1}), key_of({"n": 4, "r": 2}, {"x": 2})}) == 3


# ---------------------------------------------------------------- report


def test_report_has_its_shape_and_survives_json(make: Callable[..., Report]) -> None:
    r = make(line("a"), line("b", status="failed"), line("c", status="different"))
    assert conforms(r, Report)
    assert json.loads(json.dumps(r, allow_nan=False)) == r
    for key in r:
        assert not conforms({k: v for k, v in r.items() if k != key}, Report)
    assert not conforms({**r, "drift": "much"}, Report)
    assert not conforms({**r, "points": [{**line("a"), "status": None}]}, Report)


def test_front_and_choices(make: Callable[..., Report]) -> None:
    """Autoregressive decoding takes 1 ms a byte; the fastest point by far has another text."""
    r = make(
        line("slow", 8.0, 5.0), line("good", 2.0, 4.0), line("worse", 3.0, 3.9),
        line("wrong", 0.1, 9.0, "different"), line("quick", 1.2, 1.5), line("x", status="failed"),
        max_ms_per_round=1.5,
    )  # fmt: skip
    f = r["modes"]["greedy"]
    assert f["front"] == [PLAIN, "quick n=4", "good n=4", "slow n=4"]
    assert f["best"] is not None
    assert f["within_limit"] is not None
    assert (f["best"]["name"], f["within_limit"]["name"]) == ("good n=4", "quick n=4")
    # Sampled points have half the bytes: quick (0.75 in 1.2 ms) loses to plain decoding.
    s = r["modes"]["sampled"]
    assert s["within_limit"] is not None
    assert (s["front"], s["within_limit"]["name"]) == ([PLAIN, "good n=4", "slow n=4"], PLAIN)
    assert make(line("a"), max_ms_per_round=0.5)["modes"]["greedy"]["within_limit"] is None
    assert make(line("x", status="failed"))["modes"]["greedy"]["best"] is None


# ---------------------------------------------------------------- page


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = ("meta", "br", "line", "circle", "path")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_page_escapes_hostile_names(make: Callable[..., Report]) -> None:
    r = make(line(HOSTILE), line("b", status="failed"), line("plain", 1.0, 2.0))
    r["verifier"] = r["prompts"]["path"] = HOSTILE
    source = page(r)
    read = Reader(source)
    names = {t for t, _ in read.tags}
    assert not names & {"script", "img", "iframe", "link", "object"}
    assert all(not k.startswith("on") for _, a in read.tags for k in a)
    assert "\x1b" not in source
    assert "\u202e" not in source
    shown = "".join(c if c.isprintable() else "?" for c in HOSTILE)
    assert sum(shown in s for s in read.said) >= 5  # as text: names, error, verifier, machine
    assert text(HOSTILE) in source


def test_page_needs_nothing_from_elsewhere(make: Callable[..., Report]) -> None:
    source = page(make(line("a"), line("b", 1.0, 2.0)))
    read = Reader(source)
    links = [str(a[k]) for _, a in read.tags for k in ("href", "src") if k in a]
    assert links
    assert all(x.startswith("#") for x in links)
    assert "url(" not in source
    assert "@import" not in source
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {x[1:] for x in links} <= set(ids)  # every point of the plot leads to its row
    policy = next(a["content"] for t, a in read.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_page_is_for_the_keyboard_and_readers(make: Callable[..., Report]) -> None:
    read = Reader(page(make(line("a"), line("b", status="failed"))))
    regions = [a for t, a in read.tags if t == "div"]
    assert len(regions) == 3
    ids = {a.get("id") for _, a in read.tags}
    for a in regions:
        assert a["tabindex"] == "0"
        assert a["role"] == "region"
        assert a["aria-labelledby"] in ids
    assert {a.get("scope") for t, a in read.tags if t == "th"} == {"col", "row"}
    assert all(a.get("aria-label") for t, a in read.tags if t in ("a", "svg"))
    assert ("html", {"lang": "en"}) in read.tags


def test_scatter_draws_what_it_is_given() -> None:
    marks = [
        Mark("plain", "p", {"value": 1.0, "low": None, "high": None}, interval(1.0), True, True),
        Mark("a<b", "r", interval(2.0), interval(4.0), True),
        Mark("dull", "s", interval(4.0), interval(3.0), False),
    ]
    root = ElementTree.fromstring(scatter(marks, "t"))
    circles = [c for a in root.findall("a") for c in a.findall("circle")]
    xs = sorted(float(c.get("cx", "")) for c in circles)
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[0]) / 3, abs=0.11)  # 1, 2 and 4 ms
    assert {a.get("href") for a in root.findall("a")} == {"#p", "#r", "#s"}
    assert len(root.findall("path")) == 1
    assert scatter([], "t") == ""
