"""Bundles: what is in them, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shipped import refused, rewrite_manifest, small

import pcc
from pcc.bundle import RUNTIME_OF_OPSET, inside, names_of, read_manifest, sha256, staged
from pcc.circuit.queries import QUERIES
from pcc.driver import query_module
from pcc.errors import PccError
from pcc.passes.manager import Manager
from pcc.passes.pipelines import tensor_pipeline
from pcc.runtime import ort

PASS = {"name": "dce", "of": "circuit", "changed": False, "nodes_before": 1, "nodes_after": 1,
        "ms": 0.1, "check_ms": 0.1, "error": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pcc.compile(small(), out=tmp_path_factory.mktemp("bundle") / "small.pcc").path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy.pcc"))


# ------------------------------------------------------------------ what it holds


def test_manifest(made: Path) -> None:
    m = json.loads((made / "manifest.json").read_text())
    assert m["schema_version"] == "1.1"
    assert m["producer"] == f"pcc {pcc.__version__}"
    want = {"kind": "cp", "n": 3, "r": 2, "V": 4, "cards": [4, 4, 4], "parameters": "context"}
    assert {k: m["circuit"][k] for k in want} == want
    assert set(m["vocabulary"]) == {"byte_offset", "bos", "eos", "pad", "special"}
    assert m["precision"] == {"default": "fp32"}
    assert m["verifier"] is None
    assert m["variants"][0]["onnxruntime"] == ">=1.24"
    assert max(m["numerics"]["max_abs_error"].values()) < 5e-5
    assert m["numerics"]["runtime"].startswith("onnxruntime ")
    assert m["queries"]["mode"]["exact"] is False
    slots = m["queries"]["sample"]["random"]["slots"]
    u = next(i for i in m["queries"]["sample"]["inputs"] if i["name"] == "u")
    assert len(slots) == u["shape"][1]
    assert [s["role"] for s in slots] == ["latent"] + ["token"] * 3


def test_every_file_is_listed_with_its_hash(made: Path) -> None:
    files = json.loads((made / "manifest.json").read_text())["files"]
    on_disk = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert set(files) == on_disk - {"manifest.json"}
    assert all(sha256(made / name) == want for name, want in files.items())
    assert sum(name.endswith("weights.bin") for name in files) == 1


def test_samples_and_stages(made: Path) -> None:
    engine = pcc.load(made)
    for query, spec in engine.queries.items():
        with np.load(made / "samples" / f"{query}.npz") as data:
            assert {k[3:] for k in data if k.startswith("in.")} == {
                i["name"] for i in spec["inputs"]
            }
            assert {k[4:] for k in data if k.startswith("out.")} == {
                o["name"] for o in spec["outputs"]
            }
    stages = sorted(p.stem for p in (made / "ir").glob("*.pcir"))
    assert stages[0] == "00-circuit"
    assert {s[3:] for s in stages} >= {"optimised", *(f"tensor-{q}" for q in engine.queries)}
    from pcc.circuit import text
    from pcc.stored import Stages

    held = Stages(made, engine.manifest["files"])
    for name, file in held.names.items():
        assert text.show(held.module(name)) == (made / file).read_text()


def test_structure_hash_ignores_numbers_only() -> None:
    from pcc.package import structure_hash

    def of(circuit: pcc.Circuit) -> str:
        return structure_hash(circuit.module())

    make = pcc.templates.cp
    assert of(make(3, 2, 4, seed=0)) == of(make(3, 2, 4, seed=1))
    others = [make(3, 2, 5), make(3, 3, 4), make(4, 2, 4), pcc.templates.hmm(3, 2, 4)]
    assert len({of(c) for c in (make(3, 2, 4), *others)}) == 5


def test_compiling_twice_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    """Equal nodes are one object, but what else is alive does not show in a bundle."""
    other = pcc.templates.hmm(3, 2, 4, seed=4)
    alive = [query_module(other, other.root, q)[0] for q in sorted(QUERIES)]
    alive = [Manager(validate=False).run(m, tensor_pipeline()) for m in alive]
    assert any(n.loc.startswith("c.") for m in alive for n in m.nodes())
    again = pcc.compile(small(), out=tmp_path / "again.pcc").path
    first, second = (json.loads((p / "manifest.json").read_text()) for p in (made, again))
    # Archives of samples hold times of day; everything else is equal.
    keep = {k: v for k, v in first["files"].items() if not k.startswith("samples/")}
    assert keep == {k: v for k, v in second["files"].items() if not k.startswith("samples/")}


# ------------------------------------------------------------------ what is refused


def test_a_flipped_byte_anywhere(bundle: Path) -> None:
    for name in read_manifest(bundle)["files"]:
        path = bundle / name
        data = bytearray(path.read_bytes())
        if not data:  # weights.bin, where every weight is small enough to be in the graph
            continue
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert name in refused("B212", lambda: pcc.load(bundle)).what
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    pcc.load(bundle)


def test_missing_extra_and_linked_files(bundle: Path, tmp_path: Path) -> None:
    weights = bundle / "graphs" / "weights.bin"
    away = tmp_path / "weights.bin"
    weights.rename(away)
    refused("B212", lambda: pcc.load(bundle))
    weights.symlink_to(away)
    refused("B213", lambda: pcc.load(bundle))
    weights.unlink()
    weights.mkdir()
    refused("B212", lambda: pcc.load(bundle))
    weights.rmdir()
    away.rename(weights)
    for extra in ("graphs/other.onnx", "notes.txt", ".hidden"):
        (bundle / extra).write_text("")
        assert extra in refused("B214", lambda: pcc.load(bundle)).what
        (bundle / extra).unlink()
    (bundle / "link").symlink_to("/")
    refused("B214", lambda: pcc.load(bundle))
    (bundle / "link").unlink()
    os.mkfifo(bundle / "pipe")
    refused("B214", lambda: pcc.load(bundle))
    (bundle / "pipe").unlink()
    samples = bundle / "samples"
    samples.rename(tmp_path / "samples")
    samples.symlink_to(tmp_path / "samples")
    refused("B213", lambda: pcc.load(bundle))


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "graphs/../../x", "a\\b", "", ".", "a//b", "./a", "a/./b", "a\0b"],
)
def test_paths_that_lead_out(bundle: Path, name: str) -> None:
    refused("B213", lambda: inside(bundle, name))
    files = read_manifest(bundle)["files"]
    rewrite_manifest(bundle, files=files | {name: "0" * 64})
    refused("B213", lambda: pcc.load(bundle))


def test_not_a_bundle(bundle: Path, tmp_path: Path) -> None:
    refused("B210", lambda: pcc.load(tmp_path / "absent"))
    refused("B210", lambda: pcc.load(tmp_path))
    refused("B210", lambda: pcc.load(bundle / "manifest.json"))
    manifest = bundle / "manifest.json"
    whole = manifest.read_text()
    for text in ("", "{", "[]", "3", "[" * 100_000, whole[: len(whole) // 2], '{"a": ' * 50_000):
        manifest.write_text(text)
        refused("B210", lambda: pcc.load(bundle))
    manifest.write_bytes(b"\xff\xfe")
    refused("B210", lambda: pcc.load(bundle))
    with manifest.open("wb") as f:
        f.truncate(1 << 40)  # a hole: no byte of it is on the disk
    refused("B210", lambda: pcc.load(bundle))
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    refused("B210", lambda: pcc.load(bundle))


@pytest.mark.parametrize(
    "version", ["2.0", "1.2", "0.9", "1", "1.0.0", "x.y", "", "1.-1", 1.1, None]
)
def test_other_schema_versions(bundle: Path, version: Any) -> None:
    rewrite_manifest(bundle, schema_version=version, producer="pcc 9.9")
    if version == 1.1:
        pcc.load(bundle)  # the number 1.1 reads as the text
        return
    found = refused("B211", lambda: pcc.load(bundle))
    if version == "1.2":
        assert "schema 1.2, this pcc reads up to 1.1" in found.what
        assert "pcc 9.9" in found.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", []),
        ("files", None),
        ("opset", "24"),
        ("opset", 1 << 70),
        ("queries", []),
        ("queries__prefix", 3),
        ("queries__prefix__graph", "graphs/absent.onnx"),
        ("queries__prefix__graph", "../../x.onnx"),
        ("queries__prefix__inputs", {}),
        ("queries__prefix__inputs", [3]),
        ("queries__prefix__inputs", [{"name": "x", "dtype": "f16", "shape": ["B", 3]}]),
        ("queries__prefix__inputs", [{"name": "x", "dtype": "i64", "shape": ["B", 1 << 60]}]),
        ("queries__prefix__inputs", [{"name": "y", "dtype": "i64", "shape": ["B", 9999, 999999]}]),
        ("queries__prefix__inputs", [{"name": "x", "dtype": "i64", "shape": []}]),
        ("queries__prefix__inputs", [{"name": [], "dtype": "i64", "shape": ["B", 3]}]),
        ("queries__prefix__outputs", [{"name": "a", "dtype": "f32", "shape": ["B"]}]),
        ("circuit", None),
        ("circuit__cards", [4, 4]),
        ("circuit__cards", [4, 4, "4"]),
        ("circuit__cards", [4, 4, True]),
        ("circuit__cards", [4, 4, -1]),
        ("circuit__n", 1 << 40),
        ("circuit__name", 7),
        ("numerics", {}),
        ("passes", {}),
        ("unsupported", None),
        ("unsupported", {"mode": 3}),
        ("numerics__max_abs_error", {"loglik": "x"}),
        ("numerics__max_abs_error", {"loglik": 10**400}),
        ("numerics__max_abs_error", {"loglik": 1e300}),
        ("passes", [{}]),
        ("passes", [3]),
        ("passes", [PASS | {"check_ms": None}]),
        ("passes", [PASS | {"changed": 1}]),
        ("circuit__r", None),
        ("circuit__V", "4"),
        ("circuit__V", 5),
        ("producer", None),
        ("vocabulary", None),
        ("vocabulary__eos", [[]]),
        ("vocabulary__bos", "0"),
        ("generation", 3),
        ("generation", {}),
        ("queries__mode__exact", 0),
        ("queries__prefix__one_row", []),
        ("queries__sample__random", {}),
        ("queries__sample__random__slots", [{"role": "letent", "layer": 0, "index": 0}]),
        ("queries__sample__random__slots", [{"role": [], "layer": 0, "index": 0}]),
        ("queries__sample__random__slots", [{"role": "latent", "layer": 0, "index": True}]),
    ],
)
def test_malformed_manifest(bundle: Path, key: str, value: Any) -> None:
    rewrite_manifest(bundle, **{key: value})
    refused("B215", lambda: pcc.load(bundle))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"check_ms"', '"check_Ms"'),
        ('"exact": false', '"exact": true'),
        ('"opset": 24', '"opset": 25'),
        ('"role": "latent"', '"role": "letent"'),
        ('"sha256"', '"sha257"'),
    ],
)
def test_an_entry_that_changed(bundle: Path, old: str, new: str) -> None:
    path = bundle / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert "manifest has changed" in refused("B212", lambda: pcc.load(bundle)).what


def test_a_flipped_bit_anywhere_in_the_manifest(bundle: Path) -> None:
    """Each is refused, or reads as the same manifest (another white space)."""
    path = bundle / "manifest.json"
    whole, want = path.read_bytes(), read_manifest(bundle)
    rng = np.random.default_rng(7)
    same, codes = 0, set()
    places = [*range(40), *rng.integers(40, len(whole), 360)]  # the schema's version, then anywhere
    for at, bit in zip(places, rng.integers(0, 8, 400), strict=True):
        data = bytearray(whole)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        try:
            assert read_manifest(bundle) == want, (at, bit)
            same += 1
        except PccError as e:
            codes.add(e.code)
    assert codes == {"B210", "B211", "B212"}
    assert same < 100


def test_numbers_that_json_does_not_have(bundle: Path) -> None:
    path = bundle / "manifest.json"
    text = path.read_text()
    for name in ("NaN", "Infinity", "-Infinity"):
        path.write_text(text.replace('"opset": 24', f'"opset": {name}'))
        refused("B210", lambda: pcc.load(bundle))


def test_an_opset_that_the_runtime_lacks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "1.19.2"

        @staticmethod
        def get_available_providers() -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "import_ort", lambda: Old)
    found = refused("B220", lambda: pcc.load(bundle))
    assert "opset 24" in found.what
    assert f"needs ONNX Runtime {RUNTIME_OF_OPSET[24]}" in found.what
    assert "installed is 1.19.2" in found.what
    rewrite_manifest(bundle, opset=17)
    pcc.load(bundle)


def test_an_opset_of_the_future(bundle: Path) -> None:
    rewrite_manifest(bundle, opset=99)
    assert "no ONNX Runtime known to pcc" in refused("B220", lambda: pcc.load(bundle)).what


def test_a_graph_that_is_none_and_a_graph_that_reads_elsewhere(bundle: Path) -> None:
    import onnx

    (bundle.parent / "secret.bin").write_bytes(bytes(1 << 16))
    graph = bundle / "graphs" / "prefix.onnx"
    model = onnx.load(graph, load_external_data=False)
    names = [t for t in model.graph.initializer if t.external_data]
    if not names:  # all weights of this small circuit are inline: make one external
        t = model.graph.initializer[0]
        del t.external_data[:]
        size = len(t.raw_data)
        t.ClearField("raw_data")
        t.data_location = onnx.TensorProto.EXTERNAL
        for k, v in (("location", "../../secret.bin"), ("offset", "0"), ("length", str(size))):
            t.external_data.add(key=k, value=v)
    else:
        for e in names[0].external_data:
            if e.key == "location":
                e.value = "../../secret.bin"
    for data in (model.SerializeToString(), b"", b"\x08\x0a junk", graph.read_bytes()[:300]):
        graph.write_bytes(data)
        files = json.loads((bundle / "manifest.json").read_text())["files"]
        rewrite_manifest(bundle, files=files | {"graphs/prefix.onnx": sha256(graph)})
        engine = pcc.load(bundle)
        refused("B221", lambda e=engine: e.session_of("prefix"))  # type: ignore[misc]


# ------------------------------------------------------------------ writing


def test_staged_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "a.pcc", force=False) as folder:
            (folder / "half").write_text("written")
            raise OSError(28, "No space left on device")

    assert "No space left" in refused("B203", fail).what
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_bundles_only(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("data")
    link = tmp_path / "link.pcc"
    link.symlink_to(bundle)
    dangling = tmp_path / "dangling.pcc"
    dangling.symlink_to(tmp_path / "nowhere")
    before = sorted(p.name for p in tmp_path.iterdir())
    for out in (other, link, dangling, tmp_path / "other" / "precious"):
        refused("B201", lambda o=out: pcc.compile(small(), out=o))  # type: ignore[misc]
        refused("B204", lambda o=out: pcc.compile(small(), out=o, force=True))  # type: ignore[misc]
    for out in (Path("."), Path("/")):
        refused("B202", lambda o=out: pcc.compile(small(), out=o, force=True))  # type: ignore[misc]
    refused("B202", lambda: pcc.compile(small(), out=tmp_path / "no" / "a.pcc"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (other / "precious").read_text() == "data"
    done = pcc.compile(pcc.templates.ff(2, 3), out=bundle, force=True)
    assert read_manifest(bundle)["circuit"]["kind"] == done.manifest["circuit"]["kind"] == "ff"
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_names_of_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names_of(tmp_path) == ["a/b", "loop"]
