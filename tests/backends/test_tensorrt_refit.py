"""Other weights for plans that were built with `refit`: compared, taken over, filled at loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import stand_in
from safetensors.numpy import load_file, save_file
from shipped import TINY

import pcc
from pcc.backends.tensorrt.compare import compared
from pcc.backends.tensorrt.runtimes import RUNTIMES, TensorRt
from pcc.circuit.text import save
from pcc.conformance import models
from pcc.errors import PccError
from pcc.exchange import choices
from pcc.frontends import templates

OLD, TEN = RUNTIMES["8.6"], RUNTIMES["10"]
PROMPT = b"\x07\x50ab"
REFIT = {"refit": "refit"}
BIAS = "mt_head._sum_weights_heads.0.bias"


def circuit(seed: int, kind: str = "hmm", r: int = 3) -> Any:
    return getattr(templates, kind)(4, r, 40, context=16, seed=seed)


def compiled(source: Any, out: Path, r: TensorRt, **engine: Any) -> Any:
    return pcc.compile(source, target=r.target, out=out, queries=["prefix"], validate=False,
                       engine=REFIT | engine)  # fmt: skip


def answer(path: Path, provider: str = "tensorrt") -> Any:
    rng = np.random.default_rng(0)
    feed = {"x": rng.integers(0, 40, (1, 4)), "context": rng.normal(size=(1, 16))}
    feed["context"] = feed["context"].astype(np.float32)
    return pcc.load(path, provider=provider).run("prefix", **feed)["log_cond"]


def on_host(source: Any, out: Path) -> Any:
    pcc.compile(source, out=out, queries=["prefix"], validate=False)
    return answer(out, "cpu")


@pytest.mark.parametrize("r", [OLD, TEN], ids=["8.6", "10"])
@pytest.mark.parametrize("kind", ["hmm", "btree", "cp"])
def test_a_refitted_bundle_answers_as_the_new_head(
    tmp_path: Path, monkeypatch: Any, r: TensorRt, kind: str
) -> None:
    stand_in(monkeypatch, r, tmp_path / "a.pcc")
    first = compiled(circuit(1, kind), tmp_path / "a.pcc", r)
    old, new = (on_host(circuit(s, kind), tmp_path / f"{s}.pcc") for s in (1, 2))
    assert np.abs(old - new).max() > 1e-2
    np.testing.assert_allclose(answer(first.path), old, atol=1e-4)
    made = pcc.refit(first.path, circuit(2, kind), out=tmp_path / "b.pcc", validate=False)
    plans = [next(p.glob("engines/*/prefix.plan")) for p in (first.path, made.path)]
    assert plans[0].read_bytes() == plans[1].read_bytes()
    stand_in(monkeypatch, r, tmp_path / "b.pcc")
    np.testing.assert_allclose(answer(made.path), new, atol=1e-4)
    (variant,) = made.manifest["variants"]
    assert variant["refit"] is True
    assert variant["options"] == first.manifest["variants"][0]["options"]


def test_stripped_plans_are_filled(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, TEN, tmp_path / "a.pcc")
    first = compiled(circuit(1), tmp_path / "a.pcc", TEN, strip=True)
    want = on_host(circuit(1), tmp_path / "1.pcc")
    np.testing.assert_allclose(answer(first.path), want, atol=1e-4)
    made = pcc.refit(first.path, circuit(2), out=tmp_path / "b.pcc", validate=False)
    stand_in(monkeypatch, TEN, made.path)
    want = on_host(circuit(2), tmp_path / "2.pcc")
    np.testing.assert_allclose(answer(made.path), want, atol=1e-4)


def test_refitting_again_counts_from_the_plan(tmp_path: Path, monkeypatch: Any) -> None:
    """What the second head shares with the first, but not with the plan, is exchanged too."""
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    pcc.refit(tmp_path / "a.pcc", circuit(2), out=tmp_path / "b.pcc", validate=False)
    made = pcc.refit(tmp_path / "b.pcc", circuit(2), out=tmp_path / "c.pcc", validate=False)
    stand_in(monkeypatch, OLD, made.path)
    want = on_host(circuit(2), tmp_path / "host.pcc")
    np.testing.assert_allclose(answer(made.path), want, atol=1e-4)


def test_the_same_weights_need_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    made = pcc.refit(tmp_path / "a.pcc", circuit(1), out=tmp_path / "b.pcc", validate=False)
    (listed,) = made.path.glob("engines/*/refit.json")
    entries = json.loads(listed.read_text())["prefix"]
    assert len(entries) > 2
    assert not any(e["changed"] for e in entries)
    trt = stand_in(monkeypatch, OLD, made.path)
    trt.Refitter.refit_cuda_engine = lambda self: pytest.fail("nothing was to be refitted")
    want = on_host(circuit(1), tmp_path / "host.pcc")
    np.testing.assert_allclose(answer(made.path), want, atol=1e-4)


def test_what_the_engine_misses_beside_is_given(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    made = pcc.refit(tmp_path / "a.pcc", circuit(2), out=tmp_path / "b.pcc", validate=False)
    (listed,) = made.path.glob("engines/*/refit.json")
    same = [e["name"] for e in json.loads(listed.read_text())["prefix"] if not e["changed"]]
    assert same
    trt = stand_in(monkeypatch, OLD, made.path)
    trt.Refitter.partners = tuple(same)
    want = on_host(circuit(2), tmp_path / "host.pcc")
    np.testing.assert_allclose(answer(made.path), want, atol=1e-4)


@pytest.mark.parametrize("profiles", [False, True])
def test_texts_of_another_head_are_the_verifiers(
    tmp_path: Path, monkeypatch: Any, profiles: bool
) -> None:
    folder = models.llama_folder(tmp_path / "model", noise=0.25)
    heads = [models.head("hmm", 4, 3), templates.hmm(4, 3, 258, context=48, seed=3)]
    how: dict[str, Any] = {"max_seq": 128, "chunk": 8, "queries": ["draft"], "validate": False}
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    pcc.compile(heads[0], verifier=folder, target="tensorrt", out=tmp_path / "a.pcc",
                engine={**REFIT, "profiles": profiles}, **how)  # fmt: skip
    made = pcc.refit(tmp_path / "a.pcc", heads[1], folder, tmp_path / "b.pcc", validate=False)
    (listed,) = made.path.glob("engines/*/refit.json")
    weights = json.loads(listed.read_text())
    assert any(e["changed"] for e in weights["step"])
    if profiles:
        assert not any(e["changed"] for e in weights["pass"])  # the verifier is as it was
    trt = stand_in(monkeypatch, OLD, made.path)
    engine = pcc.load(made.path, provider="tensorrt")
    pcc.compile(heads[1], verifier=folder, out=tmp_path / "host.pcc", truncation=False, **how)
    host = pcc.load(tmp_path / "host.pcc", threads=1)
    for options in ({"greedy": True}, {"seed": 7}):
        got, want = (e.session(**options).generate(PROMPT, 50) for e in (engine, host))
        assert got.bytes == want.bytes
        assert got.stats["acceptance_rate"] == want.stats["acceptance_rate"]
    assert trt.engines


def test_choices_are_read_back(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    folder = models.llama_folder(tmp_path / "model", noise=0.25)
    made = pcc.compile(
        models.head("hmm", 4, 3), verifier=folder, target="tensorrt", out=tmp_path / "a.pcc",
        max_seq=96, chunk=5, queries=["draft"], validate=False, precision="fp16", batch=2,
        window=3, truncation=True, draft_mode="max-product", proposal="latent-first", engine=REFIT,
    )  # fmt: skip
    assert choices(made.manifest, "a.pcc") == {
        "target": "tensorrt", "precision": "fp16", "batch": 2, "queries": ["draft"],
        "parameters": "context", "window": 3, "max_seq": 96, "chunk": 5,
        "proposal": "latent-first", "draft_mode": "max-product", "truncation": True,
    }  # fmt: skip


# ---------------------------------------------------------------- what cannot be refitted


@pytest.mark.parametrize(
    "head", [circuit(2, r=4), circuit(2, "cp"), templates.hmm(5, 3, 40, context=16, seed=2)]
)
def test_heads_of_other_shapes_are_refused(tmp_path: Path, monkeypatch: Any, head: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    with pytest.raises(PccError, match="is of another graph") as found:
        pcc.refit(tmp_path / "a.pcc", head, out=tmp_path / "b.pcc", validate=False)
    assert found.value.code == "E437"
    assert not (tmp_path / "b.pcc").exists()


def test_a_window_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    heads = [templates.hmm(5, 3, 40, context=16, seed=s) for s in (1, 2)]
    how: dict[str, Any] = {"queries": ["prefix"], "validate": False, "window": 4}
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    pcc.compile(heads[0], target="tensorrt", out=tmp_path / "a.pcc", engine=REFIT, **how)
    made = pcc.refit(tmp_path / "a.pcc", heads[1], out=tmp_path / "b.pcc", validate=False)
    stand_in(monkeypatch, OLD, made.path)
    pcc.compile(heads[1], out=tmp_path / "host.pcc", **how)
    want = answer(tmp_path / "host.pcc", "cpu")
    np.testing.assert_allclose(answer(made.path), want, atol=1e-4)


@pytest.mark.parametrize(
    ("engine", "says"),
    [({"refit": "none"}, "refit=none"), ({"refit": "refit_identical"}, "refit=refit_identical")],
)  # fmt: skip
def test_plans_that_were_not_built_for_it_are_refused(
    tmp_path: Path, monkeypatch: Any, engine: dict[str, str], says: str
) -> None:
    stand_in(monkeypatch, TEN, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", TEN, **engine)
    with pytest.raises(PccError, match=says) as found:
        pcc.refit(tmp_path / "a.pcc", circuit(2), out=tmp_path / "b.pcc", validate=False)
    assert found.value.code == "E437"


def test_options_may_not_contradict_the_plans(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    plans = {"plans": str(tmp_path / "a.pcc")}
    compiled(circuit(2), tmp_path / "b.pcc", OLD, **plans, keep_onnx="yes")
    with pytest.raises(PccError, match="built with level=3, not '1'"):
        compiled(circuit(2), tmp_path / "c.pcc", OLD, **plans, level="1")
    with pytest.raises(PccError, match=r"for 8\.6, not for TensorRT 10"):
        compiled(circuit(2), tmp_path / "c.pcc", TEN, **plans)
    host = tmp_path / "host.pcc"
    pcc.compile(circuit(1), out=host, queries=["prefix"], validate=False)
    with pytest.raises(PccError, match="no TensorRT engines"):
        pcc.refit(host, circuit(2), out=tmp_path / "c.pcc")
    with pytest.raises(PccError, match="has no verifier") as found:
        pcc.refit(tmp_path / "a.pcc", circuit(2), tmp_path, tmp_path / "c.pcc")
    assert found.value.code == "E438"


def edited(path: Path, out: Path, edit: Callable[[Any], Any]) -> Path:
    model = onnx.load(str(path), load_external_data=False)
    edit(model.graph)
    out.mkdir()
    (out / "prefix.onnx").write_bytes(model.SerializeToString())
    (out / "weights.bin").write_bytes((path.parent / "weights.bin").read_bytes())
    return out / "prefix.onnx"


def _first(g: Any, kind: int) -> Any:
    return next(i for i in g.initializer if i.data_type == kind)


def _scaled(tensor: Any) -> None:
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array + array.dtype.type(1), tensor.name))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda g: g.node[3].__setattr__("op_type", "Neg"), "is of another graph"),
        (lambda g: g.node.pop(), "nodes, not"),
        (lambda g: g.output[0].__setattr__("name", "other"), "its outputs"),
        (lambda g: g.input[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 7),
         "its inputs"),
        (lambda g: g.initializer.pop(), "its constants"),
        (lambda g: _scaled(_first(g, onnx.TensorProto.INT64)), "is no weight"),
        (lambda g: _first(g, 1).dims.append(1), "the size of"),
    ],
)  # fmt: skip
def test_anything_but_a_weight_is_a_difference(
    tmp_path: Path, edit: Callable[[Any], Any], says: str
) -> None:
    pcc.compile(circuit(1), out=tmp_path / "m.pcc", queries=["prefix"], validate=False)
    graph = tmp_path / "m.pcc/graphs/prefix.onnx"
    assert compared(graph, edited(graph, tmp_path / "same", lambda g: None), "prefix")
    with pytest.raises(PccError, match=says) as found:
        compared(graph, edited(graph, tmp_path / "other", edit), "prefix")
    assert found.value.code == "E437"


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("prefix"), lambda d: d["prefix"].append({}),
        lambda d: d["prefix"][0].__setitem__("shape", [-1]),
        lambda d: d["prefix"][0].__setitem__("dtype", "object"),
        lambda d: d["prefix"][0].__setitem__("offset", -8),
        lambda d: d["prefix"][0].__setitem__("changed", 1),
        lambda d: d["prefix"][0].__setitem__("shape", [1 << 50]),
        lambda d: [e.__setitem__("offset", 1 << 40) for e in d["prefix"]],
        lambda d: [e.__setitem__("file", "../../etc/passwd") for e in d["prefix"]],
        lambda d: [e.__setitem__("name", f"{i}") for i, e in enumerate(d["prefix"])],
        lambda d: d["prefix"].clear(),
    ],
)  # fmt: skip
def test_lists_of_weights_are_read_as_hostile(
    tmp_path: Path, monkeypatch: Any, damage: Callable[[Any], Any]
) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    made = pcc.refit(tmp_path / "a.pcc", circuit(2), out=tmp_path / "b.pcc", validate=False)
    trt = stand_in(monkeypatch, OLD, made.path)
    trt.Refitter.partners = ("w0",)
    engine = pcc.load(made.path, provider="tensorrt")
    (listed,) = made.path.glob("engines/*/refit.json")
    found = json.loads(listed.read_text())
    damage(found)
    listed.write_text(json.dumps(found))
    if not found.get("prefix", [1]):  # nothing is said to differ: the engine stays as it was built
        engine.executor("prefix")
        return
    with pytest.raises(PccError) as refused:
        engine.executor("prefix")
    assert refused.value.code in ("B215", "B216", "B213", "X335")


def test_an_engine_that_keeps_a_number_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    made = pcc.refit(tmp_path / "a.pcc", circuit(2), out=tmp_path / "b.pcc", validate=False)
    trt = stand_in(monkeypatch, OLD, made.path)
    (listed,) = made.path.glob("engines/*/refit.json")
    changed = [e["name"] for e in json.loads(listed.read_text())["prefix"] if e["changed"]]
    trt.Refitter.refuses = (changed[0],)
    with pytest.raises(PccError, match=f"no exchangeable weight '{changed[0]}'") as found:
        pcc.load(made.path, provider="tensorrt").executor("prefix")
    assert found.value.code == "X335"


def test_the_command(tmp_path: Path, monkeypatch: Any, command: Any) -> None:
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    compiled(circuit(1), tmp_path / "a.pcc", OLD)
    save(circuit(2).module(), tmp_path / "head.pcir")
    args = ["refit", tmp_path / "a.pcc", "--head", tmp_path / "head.pcir"]
    done = command(*args, "-o", tmp_path / "b.pcc")
    assert (done.code, "nothing was built" in done.out) == (0, True), done
    assert (tmp_path / "b.pcc/manifest.json").is_file()
    save(circuit(2, r=4).module(), tmp_path / "other.pcir")
    args[-1] = tmp_path / "other.pcir"
    done = command(*args, "-o", tmp_path / "c.pcc")
    assert (done.code, "E437" in done.err) == (2, True), done


def biased(folder: Path, bias: Any) -> Path:
    """Return a checkpoint with a bias on its sum logits, under a name that must be given."""
    shutil.copytree(TINY / "cp-n-8-r-4", folder)
    (path,) = folder.glob("model@*.safetensors")
    save_file(load_file(path) | {BIAS: np.asarray(bias, np.float32).reshape(1, 1, 4)}, path)
    return folder


def test_the_command_reads_a_checkpoint_as_compile_does(
    tmp_path: Path, monkeypatch: Any, command: Any
) -> None:
    heads = [biased(tmp_path / f"{i}", b) for i, b in enumerate(([1, 0, 2, 3], [-1, 3, 0, 1]))]
    how: dict[str, Any] = {"queries": ["prefix"], "validate": False, "hmm_bias": [BIAS]}
    stand_in(monkeypatch, OLD, tmp_path / "a.pcc")
    pcc.compile(heads[0], target="tensorrt", out=tmp_path / "a.pcc", engine=REFIT, **how)
    out = tmp_path / "b.pcc"
    args = ["refit", tmp_path / "a.pcc", "--head", heads[1], "-o", out]
    done = command(*args)
    assert (done.code, "error[F111]" in done.err, BIAS in done.err) == (2, True, True), done
    done = command(*args, "--hmm-bias", f"{BIAS}=7")
    assert (done.code, "error[F117]" in done.err, out.exists()) == (2, True, False), done
    done = command(*args, "--hmm-bias", BIAS)
    assert done.code == 0, done
    (step,) = heads[1].glob("model@*")
    newest = step.stem.partition("@")[2]
    done = command(*args, "--force", "--hmm-bias", f"{BIAS}=0", "--step", newest)
    assert done.code == 0, done
    stand_in(monkeypatch, OLD, out)
    values = [given_checkpoint(out, "tensorrt")]
    for i, head in enumerate(heads):
        pcc.compile(head, out=tmp_path / f"host{i}", **how)
        values.append(given_checkpoint(tmp_path / f"host{i}", "cpu"))
    np.testing.assert_allclose(values[0], values[2], atol=1e-4)
    assert np.abs(values[0] - values[1]).max() > 1e-2


def given_checkpoint(path: Path, provider: str) -> Any:
    """Return log q of one text under one context."""
    engine, rng = pcc.load(path, provider=provider), np.random.default_rng(0)
    c = engine.manifest["circuit"]
    context = next(i for i in engine.queries["prefix"]["inputs"] if i["name"] == "context")
    feed = {"context": rng.normal(size=(1, context["shape"][1])).astype(np.float32)}
    return engine.run("prefix", x=rng.integers(0, c["V"], (1, c["n"])), **feed)["log_cond"]
