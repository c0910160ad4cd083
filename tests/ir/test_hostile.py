"""Hostile text ends in one error with a code and a line: no traceback, bounded memory."""

from __future__ import annotations

import random
import re
import string
import subprocess
import sys
import textwrap

import pytest
from strategies import random_circuit

from pcc.circuit.registry import load_ops
from pcc.circuit.text import parse, resources, show
from pcc.errors import PccError
from pcc.ir.core import OPS

HEAD = "circuit @m {cards=[2 2]} {\n"
TABLE = "%t = t.const {value=f32[1,1,2](0.5 0.5)} : f32[1,1,2]\n"
LEAF = TABLE + "%x = c.categorical %t {vars=[0]} : units<1x1>[{0}]\n"
TAIL = "return p = %x\n}\n"
ONE = "%x = t.const {value=f32[1](0.5)} : f32[1]\n"
X = '%x = t.input {key="x", dtype="f32", batch="b", shape=[9]} : f32[b|9]\n'

# what: (text, code, line of the error)
WRONG: dict[str, tuple[str, str, int]] = {
    "nothing": ("", "E004", 1),
    "another language": ("def f():\n  return 1\n", "E001", 1),
    "no cards": ("circuit @m {\n", "E001", 1),
    "negative cardinality": ("circuit @m {cards=[-2]} {\n", "E001", 1),
    "cut before the end": (HEAD + LEAF, "E004", 4),
    "cut before the brace": (HEAD + LEAF + "return p = %x\n", "E001", 5),
    "text after the end": (HEAD + LEAF + TAIL + "%y = t.exp %t\n", "E001", 6),
    "unknown op": (HEAD + "%0 = c.categorial %1 {vars=[0]} : f32[1]\n", "E002", 2),
    "wrong type": (HEAD + LEAF.replace("1x1>", "1x2>") + TAIL, "E003", 3),
    "no type": (HEAD + LEAF.replace(" : units<1x1>[{0}]", "") + TAIL, "E001", 3),
    "undefined name": (HEAD + "%y = t.exp %x : f32[2]\n", "E005", 2),
    "undefined output": (HEAD + LEAF + "return p = %y\n}\n", "E005", 4),
    "itself": (HEAD + "%x = t.exp %x : f32[2]\n", "E005", 2),
    "a cycle": (HEAD + "%x = t.exp %y : f32[2]\n%y = t.exp %x : f32[2]\n", "E005", 2),
    "defined twice": (HEAD + TABLE + TABLE, "E009", 3),
    "output named twice": (HEAD + LEAF + "return p = %x, p = %x\n}\n", "E009", 4),
    "unknown attribute": (HEAD + TABLE + "%x = c.categorical %t {var=[0]} : f32[1]\n", "E006", 3),
    "attribute twice": (
        HEAD + "%x = t.const {value=f32[](1), value=f32[](1)} : f32[]\n",
        "E006",
        2,
    ),
    "attribute missing": (HEAD + TABLE + "%x = c.categorical %t : units<1x1>[{0}]\n", "E006", 3),
    "operand missing": (HEAD + TABLE + "%x = t.add %t : f32[1]\n", "E001", 3),
    "operand too many": (HEAD + TABLE + "%x = t.exp %t, %t : f32[1]\n", "E006", 3),
    "list for an operand": (HEAD + TABLE + "%x = t.exp [%t] : f32[1]\n", "E006", 3),
    "operand for a list": (HEAD + LEAF + "%y = c.hadamard %x : units<1x1>[{0}]\n", "E006", 4),
    "list not closed": (HEAD + LEAF + "%y = c.hadamard [%x, : units<1x1>[{0}]\n", "E001", 4),
    "empty layer": (HEAD + "%y = c.hadamard [] : units<1x1>[{0}]\n", "E103", 2),
    "word for a number": (HEAD + TABLE + "%x = t.reduce_sum %t {axis=one} : f32[1]\n", "E001", 3),
    "number for a string": (HEAD + TABLE + "%x = t.cast %t {dtype=7} : f32[1]\n", "E001", 3),
    "string not closed": (HEAD + TABLE + '%x = t.cast %t {dtype="f32} : f32[1]\n', "E001", 3),
    "unknown escape": (HEAD + TABLE + '%x = t.cast %t {dtype="\\q"} : f32[1]\n', "E001", 3),
    "unknown dtype": (HEAD + TABLE + '%x = t.cast %t {dtype="f64"} : f64[1]\n', "E112", 3),
    "unknown array dtype": (HEAD + "%x = t.const {value=f64[1](1)} : f64[1]\n", "E007", 2),
    "elements missing": (HEAD + "%x = t.const {value=f32[2](1)} : f32[2]\n", "E007", 2),
    "element of another kind": (HEAD + "%x = t.const {value=bool[1](1)} : bool[1]\n", "E007", 2),
    "integer too large": (HEAD + "%x = t.const {value=i64[1](9223372036854775808)} :\n", "E007", 2),
    "float too large": (HEAD + "%x = t.const {value=f32[1](1e39)} : f32[1]\n", "E007", 2),
    "not a number": (HEAD + "%x = t.const {value=f32[1](nan)} : f32[1]\n", "E105", 2),
    "missing bytes": (HEAD + "%x = t.const {value=#sha256-00} : f32[1]\n", "E008", 2),
    "axis out of range": (HEAD + TABLE + "%x = t.reduce_sum %t {axis=3} : f32[1]\n", "E111", 3),
    "negative size": (HEAD + X.replace("9", "-9") + TAIL, "E010", 2),
    "variable out of range": (HEAD + TABLE + "%x = c.categorical %t {vars=[2]} :\n", "E106", 3),
    "negative variable": (HEAD + TABLE + "%x = c.categorical %t {vars=[-1]} :\n", "E106", 3),
    "overlapping product": (
        HEAD + LEAF + "%y = c.hadamard [%x, %x] : units<1x1>[{0}]\n",
        "E201",
        4,
    ),
    "units for a tensor": (HEAD + LEAF + "%y = t.exp %x : units<1x1>[{0}]\n", "E101", 4),
    "a tensor for units": (HEAD + LEAF + "%y = c.sum %t, %t : units<1x1>[{0}]\n", "E101", 4),
    "no equation": (HEAD + X + '%y = t.contract %x, %x {eq="aa"} : f32[1]\n', "E113", 3),
    "control characters": (HEAD + "\x00\x1b[2J\n", "E001", 2),
    "letters of another alphabet": (HEAD + "%\u0660 = t.exp %x : f32[1]\n", "E001", 2),
}

ZEROS = "[" + " ".join(["{0}"] * 4) + "]"
DOUBLED = LEAF.replace("%x", "%c0") + "".join(
    f"%c{i + 1} = c.concat [%c{i}, %c{i}] : units<{2 << i}x1>[{' '.join(['{0}'] * (2 << i))}]\n"
    for i in range(18)
)
WIDE = ", ".join(["%c18"] * 4000)
# what: (text, code): short or plain, and as large as the reader lets it be
BOMBS: dict[str, tuple[str, str]] = {
    "range of cards": ("circuit @m {cards=[0-99999999999]} {\n", "E010"),
    "range of variables": (
        HEAD + TABLE + "%x = c.categorical %t {vars=[0-9999999999]} :\n",
        "E010",
    ),
    "range of indices": (HEAD + ONE + "%y = t.take %x {axis=0, indices=[0-99999999]} :\n", "E010"),
    "many axes": (HEAD + X.replace("9", "9999999999 " * 100_000) + TAIL, "E010"),
    "many permuted axes": (
        HEAD + ONE + "%y = t.transpose %x {perm=[0-2000000]} : f32[1]\n",
        "E010",
    ),
    "many result axes": (
        HEAD + X + f'%y = t.contract %x, %x {{eq="a,a->{"a" * 99_999}"}} :\n',
        "E",
    ),
    "large value": (HEAD + ONE + "%y = t.expand %x, %x {shape=[1099511627777]} :\n", "E010"),
    "large product": (HEAD + X.replace("9", "4000000 4000000 4000000") + TAIL, "E010"),
    "large empty array": (
        HEAD + "%x = t.const {value=f32[0,99999999999,99999999999]()} :\n",
        "E007",
    ),
    "large inline shape": (HEAD + "%x = t.const {value=f32[99999999999](1)} : f32[1]\n", "E007"),
    "layer joined to itself": (HEAD + DOUBLED + f"%y = c.concat [{WIDE}] :\n", "E010"),
    "mixture of one layer": (HEAD + DOUBLED + f"%y = c.mix [{WIDE}], %t :\n", "E010"),
    "open parentheses": (HEAD + "%0 = t.const {value=" + "(" * 1_000_000, "E001"),
    "open brackets": (HEAD + "%0 = t.concat " + "[" * 1_000_000, "E001"),
    "digits of an integer": (HEAD + ONE + "%y = t.reduce_sum %x {axis=" + "9" * 1_000_000, "E001"),
    "digits of a float": (HEAD + "%0 = t.const {value=f32[1](" + "9" * 1_000_000 + ")}\n", "E007"),
    "digits of a size": (HEAD + "%0 = t.const {value=f32[" + "9" * 1_000_000 + "](1)}\n", "E007"),
    "escapes": (HEAD + '%0 = t.input {key="' + "\\" * 1_000_001, "E001"),
    "long string": (HEAD + '%0 = t.input {key="' + "\\u0000" * 500_000, "E001"),
    "long name": (HEAD + "%" + "a" * 1_000_000 + " = t.exp %0 : f32[1]\n", "E001"),
    "blank lines": ("\n" * (1 << 23), "E010"),
}


def refusal(text: str) -> PccError:
    with pytest.raises(PccError) as e:
        parse(text, "m.pcir")
    return e.value


@pytest.mark.parametrize("what", WRONG)
def test_wrong_text_is_one_error_at_its_line(what: str) -> None:
    text, code, line = WRONG[what]
    e = refusal(text)
    assert (e.code, e.at) == (code, f"m.pcir:{line}"), str(e)
    assert e.what.isprintable()
    assert len(str(e)) < 1000


@pytest.mark.wheel
def test_errors_say_what_to_do() -> None:
    assert "did you mean 'c.categorical'?" in refusal(WRONG["unknown op"][0]).hint
    assert "c.categorical %p {vars=..}" in refusal(WRONG["attribute missing"][0]).hint
    assert "units<1x1>[{0}]" in refusal(WRONG["wrong type"][0]).what
    for text, _, _ in WRONG.values():
        assert refusal(text).hint


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_is_one_short_error(what: str) -> None:
    text, code = BOMBS[what]
    e = refusal(text)
    assert e.code.startswith(code), str(e)
    assert e.at.startswith("m.pcir:")
    assert len(str(e)) < 1000


def test_no_bomb_takes_much_memory() -> None:
    """All of them in one process whose address space is limited."""
    code = """
        import resource, sys
        sys.path[:0] = sys.argv[1:]
        import numpy
        from test_hostile import BOMBS
        from pcc.circuit.text import parse
        from pcc.errors import PccError
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
        for name, (text, _) in BOMBS.items():
            try:
                parse(text)
            except PccError:
                continue
            raise SystemExit(f"{name} was read")
    """
    here = re.sub(r"/[^/]*$", "", __file__)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), here, f"{here}/../support"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def broken(text: str, rng: random.Random) -> str:
    """Return text with one random fault."""
    i = rng.randrange(len(text) + 1)
    numbers = ["0", "-1", "2", "99999999999999999999", "1e999", "4294967296", "nan"]
    match rng.randrange(6):
        case 0:
            return text[:i] + text[i + 1 :]
        case 1:
            return text[:i] + rng.choice(string.printable + "\u00e9\u2028\ud800\0") + text[i:]
        case 2:
            lines = text.split("\n")
            a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[a], lines[b] = lines[b], lines[a]
            return "\n".join(lines)
        case 3:
            found, words = list(re.finditer(r"[ct]\.[a-z_]+", text)), list(OPS)
        case 4:
            found, words = list(re.finditer(r"\d+", text)), numbers
        case _:
            return text[:i]
    if not found:
        return text
    at = rng.choice(found)
    return text[: at.start()] + rng.choice(words) + text[at.end() :]


@pytest.mark.parametrize("seed", range(4))
def test_random_faults_never_end_in_a_traceback(seed: int) -> None:
    load_ops()
    rng, errors = random.Random(seed), list[PccError]()
    for _ in range(25):
        m = random_circuit(rng.randrange(10**6), continuous=True).module()
        good, arrays = show(m), resources(m)
        for _ in range(12):
            text = good
            for _ in range(rng.randint(1, 3)):
                text = broken(text, rng)
            try:
                show(parse(text, "m.pcir", resources=arrays))
            except PccError as e:
                errors.append(e)
    assert len(errors) > 100
    assert all(re.fullmatch(r"m\.pcir:\d+", e.at) and e.what.isprintable() for e in errors)
