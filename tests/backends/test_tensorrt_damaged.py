"""`refit` of bundles that are damaged, or a stranger's: a code, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from fake_tensorrt import stand_in

import pcc
from pcc.backends.tensorrt.compare import compared
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.backends.tensorrt.taken import Taken
from pcc.bundle import names_of, read_manifest, seal, sha256
from pcc.circuit.text import save
from pcc.errors import PccError
from pcc.exchange import choices
from pcc.frontends import templates

OLD = RUNTIMES["8.6"]
Edit = Callable[[Any], Any]


def circuit(seed: int) -> Any:
    return templates.hmm(4, 3, 40, context=16, seed=seed)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, `built`, and one that has taken its plans, `taken`."""
    folder = tmp_path_factory.mktemp("refit")
    with pytest.MonkeyPatch.context() as patched:
        stand_in(patched, OLD, folder / "built")
        pcc.compile(circuit(1), target="tensorrt", out=folder / "built", queries=["prefix"],
                    validate=False, engine={"refit": "refit"})  # fmt: skip
    pcc.refit(folder / "built", circuit(2), out=folder / "taken", validate=False)
    return folder


def damaged(
    source: Path, out: Path, manifest: Edit | None = None, files: Edit | None = None
) -> Path:
    """Return a copy with changes, whose hashes are those of what is there."""
    shutil.copytree(source, out)
    m = json.loads((out / "manifest.json").read_text())
    if files is not None:
        files(out)
    m["files"] = {name: sha256(out / name) for name in names_of(out)}
    if manifest is not None:
        manifest(m)
    m["sha256"] = seal(m)
    (out / "manifest.json").write_text(json.dumps(m))
    return out


def refusal(bundle: Path, out: Path) -> PccError:
    with pytest.raises(PccError) as found:
        pcc.refit(bundle, circuit(3), out=out, validate=False)
    assert [p.name for p in out.parent.iterdir()] == [bundle.name]
    return found.value


def plan(m: Any, change: Edit) -> None:
    """Change what the manifest says of each engine."""
    for entry in m["variants"][0]["engines"].values():
        change(entry)


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda m: m.__setitem__("variants", 3), "B215"),
        (lambda m: m.__setitem__("variants", ["x"]), "B215"),
        (lambda m: m.__setitem__("variants", []), "B215"),
        *[(lambda m, k=k: m["variants"][0].pop(k), "B215")
          for k in ("gpu", "version", "options", "precision", "runtime", "engines", "module")],
        (lambda m: m["variants"][0].__setitem__("gpu", "sm_90/../../../elsewhere"), "B215"),
        (lambda m: m["variants"][0].__setitem__("version", "²"), "B215"),
        (lambda m: m["variants"][0].__setitem__("version", [3]), "B215"),
        (lambda m: m["variants"][0].__setitem__("runtime", "10"), "E437"),
        (lambda m: m["variants"][0].__setitem__("options", [1]), "B215"),
        (lambda m: m["variants"][0]["options"].__setitem__("magic", 1), "B215"),
        (lambda m: m["variants"][0]["options"].__setitem__("level", [3]), "B215"),
        *[(lambda m, k=k, v=v: m["variants"][0]["options"].__setitem__(k, v), "B215")
          for k, v in (("layers", -1), ("layers", -2), ("layers", 1 << 40), ("level", 9),
                       ("workspace", 0), ("refit", "often"), ("hardware", "all"))],
        (lambda m: m["variants"][0]["options"].__setitem__("keep_onnx", False), "E437"),
        (lambda m: m["variants"][0].__setitem__("profiles", 3), "B215"),
        (lambda m: m["variants"][0].__setitem__(
            "profiles", {k: [3] for k in m["variants"][0]["engines"]}), "B215"),
        (lambda m: m["variants"][0].__setitem__(
            "profiles", {k: [{}] for k in m["variants"][0]["engines"]}), "E437"),
        (lambda m: m["variants"][0].__setitem__("engines", {"e/prefix.plan": 3}), "B215"),
        (lambda m: m["variants"][0].__setitem__("engines", {}), "E437"),
        (lambda m: plan(m, lambda e: e.pop("layers")), "B215"),
        (lambda m: plan(m, lambda e: e.__setitem__("pinned", 3)), "B215"),
        (lambda m: plan(m, lambda e: e.__setitem__("pinned", {"HALF": "many"})), "B215"),
        (lambda m: m["variants"][0].__setitem__(
            "engines", {"../../etc/prefix.plan": {"layers": 1, "pinned": {}}}), "B213"),
        (lambda m: m.pop("target"), "B215"),
        (lambda m: m.__setitem__("target", "none"), "E141"),
        (lambda m: m.pop("generation"), "B215"),
        (lambda m: m.__setitem__("generation", {}), "B215"),
        (lambda m: m.pop("precision"), "B215"),
        (lambda m: m.__setitem__("precision", 5), "B215"),
        (lambda m: m.__setitem__("queries", {}), "B215"),
    ],
)  # fmt: skip
def test_damaged_manifests_are_refused(
    bundles: Path, tmp_path: Path, edit: Edit, code: str
) -> None:
    found = refusal(damaged(bundles / "built", tmp_path / "a", edit), tmp_path / "b")
    assert (found.code, bool(found.at)) == (code, code != "E141"), found


JUNK = (None, True, -1, 1 << 60, "", "x", "../x", [], [3], [[]], {}, {"x": 3}, {"x": {}})


def keys() -> list[str]:
    return ["provider", "format", "gpu", "runtime", "module", "version", "precision", "aliased",
            "options", "flags", "said", "engines", "profiles", "refit"]  # fmt: skip


@pytest.mark.parametrize("key", keys())
def test_whatever_a_variant_says_it_is_read_or_refused(
    bundles: Path, tmp_path: Path, key: str
) -> None:
    assert set(read_manifest(bundles / "taken")["variants"][0]) | {"profiles"} == set(keys())
    for i, value in enumerate(JUNK):
        folder = damaged(bundles / "taken", tmp_path / f"{i}",
                         lambda m, v=value: m["variants"][0].__setitem__(key, v))  # fmt: skip
        code = ""
        try:
            choices(read_manifest(folder), "here")
            made = Taken(OLD, BuildOptions(plans=str(folder)), {})
            assert made.variant[key] == value
        except PccError as e:
            code = e.code
        assert code in ("", "B215", "E437"), (value, code)
        assert code or key not in ("format", "gpu", "runtime", "module", "options"), value


def graph(change: Edit) -> Edit:
    """Change the graph of a bundle."""

    def edit(folder: Path) -> None:
        path = folder / "graphs/prefix.onnx"
        model = onnx.load(str(path), load_external_data=False)
        change(model.graph)
        path.write_bytes(model.SerializeToString())

    return edit


def placed(key: str, value: str) -> Edit:
    """Say of a weight that lies in the weight file where or how large it is."""

    def edit(g: Any) -> None:
        weight = next(i for i in g.initializer if i.data_location == 1)
        for entry in weight.external_data:
            if entry.key == key:
                entry.value = value

    return graph(edit)


def _elsewhere(g: Any) -> None:
    """Let integers lie in a file outside the bundle."""
    tensor = next(i for i in g.initializer if i.data_type == onnx.TensorProto.INT64)
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    for key, value in (("location", "../../../../../etc/passwd"), ("offset", "0"), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _cut(g: Any) -> None:
    tensor = next(i for i in g.initializer if i.raw_data)
    tensor.raw_data = tensor.raw_data[:-1]


def _untyped(g: Any) -> None:
    tensor = next(i for i in g.initializer if i.raw_data)
    tensor.data_type = 77


def in_weights(change: Callable[[Path], Any]) -> Edit:
    return lambda folder: change(folder / "graphs/weights.bin")


@pytest.mark.parametrize(
    ("edit", "code", "says"),
    [
        (lambda p: next(p.glob("engines/*/prefix.plan")).write_bytes(b""), "E437", "is empty"),
        (lambda p: next(p.glob("engines/*/prefix.plan")).unlink(), "B215", "'graph' is not"),
        (lambda p: (p / "graphs/prefix.onnx").write_bytes(b"\xff" * 50), "E437", "is no graph"),
        (lambda p: (p / "graphs/prefix.onnx").write_bytes(b""), "E437", "0 nodes"),
        (lambda p: (p / "graphs/prefix.onnx").unlink(), "B212", "is missing"),
        (in_weights(lambda p: p.unlink()), "E437", "beyond the end of weights.bin"),
        (in_weights(lambda p: p.write_bytes(b"")), "E437", "beyond the end"),
        (in_weights(lambda p: p.write_bytes(p.read_bytes()[:-1])), "E437", "beyond the end"),
        (graph(lambda g: [i.ClearField("external_data") for i in g.initializer]), "E437",
         "another file"),
        (placed("location", "other.bin"), "E437", "another file"),
        (placed("offset", "zz"), "E437", "no place"),
        (placed("offset", "-8"), "E437", "no place"),
        (placed("offset", "9" * 5000), "E437", "no place"),
        (placed("offset", "9" * 15), "E437", "beyond the end"),
        (placed("length", "1"), "E437", "is not of"),
        (placed("length", ""), "E437", "no place"),
        (graph(_elsewhere), "E437", "another file"),
        (graph(_cut), "E437", "is no array"),
        (graph(_untyped), "E437", "the size of"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(
    bundles: Path, tmp_path: Path, edit: Edit, code: str, says: str
) -> None:
    folder = damaged(bundles / "built", tmp_path / "a", files=edit)
    found = refusal(folder, tmp_path / "b")
    assert (found.code, says in found.what) == (code, True), found


def rewritten(text: str) -> Edit:
    return lambda folder: next(folder.glob("engines/*/refit.json")).write_text(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[]", "3", '{"prefix":3}', '{"prefix":[1]}', '{"prefix":[{}]}',
     '{"prefix":{"a":1}}', "[" * 200_000,
     *(json.dumps({"prefix": [{"name": "w", "dtype": "f32", "shape": [1], "changed": True,
                               "file": "graphs/weights.bin", "offset": 0} | wrong] * times})
       for wrong, times in (({"name": 3}, 1), ({"name": []}, 1), ({"dtype": "i64"}, 1),
                            ({"dtype": []}, 1), ({"file": 3}, 1), ({"changed": 1}, 1),
                            ({"shape": [-1]}, 1), ({"offset": -1}, 1), ({}, 2)))],
)  # fmt: skip
def test_malformed_lists_of_weights_are_refused(bundles: Path, tmp_path: Path, text: str) -> None:
    """Where plans are taken over and where they are filled, one reader refuses them."""
    folder = damaged(bundles / "taken", tmp_path / "a", files=rewritten(text))
    assert refusal(folder, tmp_path / "b").code == "B215"
    with pytest.MonkeyPatch.context() as patched:
        stand_in(patched, OLD, folder)
        with pytest.raises(PccError) as found:
            pcc.load(folder, provider="tensorrt").executor("prefix")
    assert found.value.code == "B215"


def test_a_lost_list_of_weights_is_refused(bundles: Path, tmp_path: Path) -> None:
    folder = damaged(bundles / "taken", tmp_path / "a",
                     files=lambda p: next(p.glob("engines/*/refit.json")).unlink())  # fmt: skip
    assert refusal(folder, tmp_path / "b").code == "B212"


def test_integers_at_one_place_of_unlike_files_are_compared(bundles: Path, tmp_path: Path) -> None:
    """An integer table whose entry in the graph is the same may have other values in the file."""
    path = bundles / "built/graphs/prefix.onnx"
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT64)
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(len(raw)))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    for name, data in (("old", raw), ("same", raw), ("other", bytes(len(raw)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prefix.onnx").write_bytes(model.SerializeToString())
        whole = (path.parent / "weights.bin").read_bytes()
        (tmp_path / name / "weights.bin").write_bytes(data + whole[len(data) :])
    assert raw != bytes(len(raw))
    old, same, other = (tmp_path / n / "prefix.onnx" for n in ("old", "same", "other"))
    assert compared(old, same, "prefix")
    with pytest.raises(PccError, match=f"{tensor.name!r} is no weight"):
        compared(old, other, "prefix")


def test_the_command_gives_one_line(bundles: Path, tmp_path: Path, command: Any) -> None:
    bad = damaged(bundles / "built", tmp_path / "a", lambda m: m["variants"][0].pop("options"))
    save(circuit(2).module(), tmp_path / "head.pcir")
    done = command("refit", bad, "--head", tmp_path / "head.pcir", "-o", tmp_path / "b")
    assert (done.code, "error[B215]" in done.err, done.err.count("\n")) == (2, True, 1), done
