"""docs/ir.md lists every op with its fields, every rule of the verifier, and text that parses."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pcc.circuit
import pcc.ir.verify as rules
import pcc.tensor
from pcc import knobs
from pcc.circuit.registry import load_ops
from pcc.circuit.text import parse, show
from pcc.ir.core import OPS

DOC = (Path(__file__).resolve().parents[2] / "docs" / "ir.md").read_text()


def test_every_op_has_its_row() -> None:
    load_ops()
    rows = dict(re.findall(r"^\| `([ctq]\.[a-z_]+)` (\|.*\|)$", DOC, re.M))
    assert set(rows) == {name for name in OPS if name[:2] in ("c.", "t.", "q.")}
    for name, row in rows.items():
        listed = re.findall(r"`([a-z_]+)`", "|".join(row.split("|")[:3]))
        assert sorted(listed) == sorted(OPS[name].fields), name
        assert len(row.split("|")[3].strip()) > 3, name


def test_every_op_is_loaded_with_the_text_form() -> None:
    load_ops()
    before = set(OPS)
    for package in (pcc.circuit, pcc.tensor):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(info.name)
    assert before == set(OPS)


def test_every_rule_is_listed() -> None:
    prose = dict(re.findall(r"^(V\d+) .*?\((E\d+)", rules.__doc__ or "", re.M | re.S))
    assert dict(re.findall(r"^\| (V\d+) \| (E\d+)", DOC, re.M)) == prose


def test_the_example_is_canonical() -> None:
    example = re.search(r"```\n(circuit @m .*?)```", DOC, re.S)
    assert example is not None
    assert show(parse(example[1])) == example[1]


def test_the_limits_are_those_of_the_code() -> None:
    said = re.sub(r"[,*]", "", DOC[DOC.index("## Limits") :])
    for value in (
        "1 GiB",
        "64 Mi characters",
        "4 Mi |",
        "4096",
        "| 32 |",
        "2^40",
        "2^30 |",
        "65536",
    ):
        assert value in said, value
    assert (knobs.MAX_TEXT_BYTES, knobs.MAX_LINE, knobs.MAX_LINES) == (2**30, 2**26, 2**22)
    assert (knobs.MAX_ITEMS, knobs.MAX_INLINE_ELEMENTS, knobs.MAX_RANK) == (2**22, 4096, 32)
    assert (knobs.MAX_EXTENT, knobs.MAX_SCOPE_BYTES, knobs.MAX_SCOPE_WORK) == (2**40, 2**30, 2**33)
    assert (knobs.MAX_VALUE, knobs.MAX_STATES, knobs.INLINE_ELEMENTS, knobs.MAX_SCOPE_RUNS) == (
        2**30,
        65536,
        16,
        64,
    )
