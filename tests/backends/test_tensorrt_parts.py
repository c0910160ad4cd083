"""Queries of several engines, `parts` of the manifest, as a stranger may write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import stand_in

import pcc
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.conformance.verifiers import KINDS
from pcc.errors import PccError
from pcc.runtime.device.parts import MAX_PARTS, parts_of

OLD = RUNTIMES["8.6"]


def spec() -> dict[str, Any]:
    io = {"name": "x", "dtype": "i64", "shape": ["B", 4], "onnx": "x"}
    part = {
        "graph": "e/pass.plan", "profile": 1, "inputs": [io], "outputs": [{**io, "onnx": "y"}],
        "arrays": {"x": "window"}, "file": "e/tables.bin",
        "tables": [{"name": "t", "offset": 0, "bytes": 8}],
    }  # fmt: skip
    return {"graph": "e/step.plan", "batch": 1, "inputs": [], "outputs": [], "parts": [part]}


FILES = {"files": {"e/pass.plan": "", "e/tables.bin": ""}}


def test_parts_are_read() -> None:
    (part,) = parts_of(spec(), "step", FILES)
    assert (part.profile, part.tables, part.names) == (1, {"t": (0, 8)}, {"x": "window"})
    assert parts_of({"graph": "x"}, "step", FILES) == []


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "/etc/passwd"}, {"graph": 5}, {"profile": -1}, {"profile": True},
        {"profile": "0"}, {"profile": 1 << 40}, {"inputs": None}, {"inputs": [{}]},
        {"outputs": [{"name": "x", "dtype": "i64", "shape": ["B"]}]},
        {"inputs": [{"name": "x", "dtype": "i9", "shape": ["B"]}]},
        {"inputs": [{"name": "x", "dtype": "i64", "shape": ["B", -4]}]},
        {"inputs": [{"name": "x", "dtype": "i64", "shape": ["B", 1 << 60]}]},
        {"inputs": [{"name": "x", "dtype": "i64", "shape": [["B"]]}]},
        {"arrays": {"x": 5}}, {"arrays": []}, {"file": "elsewhere"}, {"file": 3}, {"tables": {}},
        {"tables": [{"name": "t", "offset": -1, "bytes": 8}]},
        {"tables": [{"name": "t", "offset": 0, "bytes": True}]},
        {"tables": [{"name": "t", "offset": 128, "bytes": 8}]},
        {"tables": [{"name": "x", "offset": 0, "bytes": 8}]},
        {"tables": [{"name": "t", "offset": 0, "bytes": 8}] * 2},
    ],
)  # fmt: skip
def test_malformed_parts_are_refused(change: dict[str, Any]) -> None:
    bad = spec()
    bad["parts"][0] |= change
    with pytest.raises(PccError) as found:
        parts_of(bad, "step", FILES)
    assert found.value.code == "B215"


@pytest.mark.parametrize("parts", [{}, [], [3], 7, [spec()["parts"][0]] * (MAX_PARTS + 1)])
def test_lists_of_parts_that_are_none_are_refused(parts: Any) -> None:
    with pytest.raises(PccError) as found:
        parts_of({"parts": parts}, "step", FILES)
    assert found.value.code == "B215"


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with profiles; who opens it lets TensorRT be stood in for."""
    folder = tmp_path_factory.mktemp("divided")
    with pytest.MonkeyPatch.context() as patched:
        stand_in(patched, OLD, folder / "m.pcc")
        source, model = KINDS["llama"](folder)
        made = pcc.compile(source, verifier=model, out=folder / "m.pcc", target=OLD.target,
                           max_seq=128, chunk=8, queries=["draft"], validate=False,
                           engine={"profiles": True})  # fmt: skip
        return Path(made.path)


def opened(monkeypatch: Any, path: Path, query: str, change: Any) -> PccError:
    """Return the error of opening a query of a bundle whose manifest says something else."""
    stand_in(monkeypatch, OLD, path)
    engine = pcc.load(path, provider="tensorrt")
    change(engine.manifest["queries"])
    with pytest.raises(PccError) as found:
        engine.executor(query)
    return found.value


def part(queries: Any, at: int = 0) -> Any:
    return queries["step_greedy"]["parts"][at]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q["step_greedy"]["parts"].pop(), "none gives"),
        (lambda q: q["step_greedy"]["parts"].reverse(), "nothing gives 'logits'"),
        (lambda q: part(q).__setitem__("profile", 9), "2 profiles"),
        (lambda q: part(q).__setitem__("profile", 1), "bytes, not"),
        (lambda q: part(q).__setitem__("profile", None), "bytes, not"),
        (lambda q: part(q)["tables"][0].__setitem__("offset", 1 << 20), "outside its file"),
        (lambda q: part(q)["tables"][0].__setitem__("offset", 4), "not aligned"),
        (lambda q: part(q)["tables"].pop(), "other arrays"),
        (lambda q: q["step_greedy"]["parts"].append(part(q, 1)), "something else gives"),
        (lambda q: q["step_greedy"]["parts"].insert(1, part(q)), "something else gives"),
        (lambda q: part(q)["arrays"].__setitem__("logits", "window"),
         "something else gives 'window'"),
        (lambda q: part(q)["arrays"].__setitem__("logits", "emitted"), "not of the query's type"),
        (lambda q: part(q, 1)["arrays"].__setitem__("logits", "emitted"), "nothing gives"),
        (lambda q: part(q)["arrays"].__setitem__("hidden", "logits"),
         "something else gives 'logits'"),
    ],
)  # fmt: skip
def test_bundles_whose_parts_do_not_fit_are_refused(
    divided: Path, monkeypatch: Any, change: Any, says: str
) -> None:
    found = opened(monkeypatch, divided, "step_greedy", change)
    assert found.code in ("B215", "X334")
    assert says in found.what


def value_of(queries: Any, query: str, key: str, name: str) -> Any:
    return next(v for v in queries[query][key] if v["name"] == name)


@pytest.mark.parametrize(
    ("query", "key", "name"),
    [("verify", "outputs", "logits"), ("verify", "inputs", "input_ids"),
     ("step_greedy", "outputs", "emitted"), ("step_greedy", "inputs", "window"),
     ("step_greedy", "inputs", "length"), ("verify", "outputs", "hidden_states"),
     ("prefill", "inputs", "u")],
)  # fmt: skip
@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.__setitem__("shape", [*v["shape"], 2]),
        lambda v: v.__setitem__("shape", [*v["shape"][:-1], 1] if v["shape"][1:] else ["B", 0]),
        lambda v: v.__setitem__("dtype", "f32" if v["dtype"] == "i64" else "i64"),
    ],
    ids=["grown", "shrunk", "type"],
)
def test_arrays_that_engines_take_otherwise_than_the_query_says_are_refused(
    divided: Path, monkeypatch: Any, query: str, key: str, name: str, change: Any
) -> None:
    """The caller's buffers have the query's sizes: an engine that writes more writes beyond."""
    found = opened(monkeypatch, divided, query, lambda q: change(value_of(q, query, key, name)))
    assert (found.code, repr(name) in found.what) == ("B215", True), found
