"""Bad input to commands: one line with a code on stderr, exit 2 (3: environment), nothing left.

What the parser, the importer, the bundle reader and the engine refuse is tested beside each of
them; here the whole program meets the same files.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shipped import PCIR, TINY, Arena, archive, npy, rewrite_manifest, small

import pcc

Make = Callable[[Path], tuple[Any, ...]]
CP = TINY / "cp-n-8-r-4"
EMISSIONS = "mt_head._categorical_log_probs_heads.0.head.proj"


@pytest.fixture(autouse=True)
def private_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pcc.compile(small(), out=tmp_path_factory.mktemp("hostile") / "small.pcc").path


# ------------------------------------------------------------------ checkpoints


def checkpoint(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Copy the shipped CP head, with its tensors changed; return the model file."""
    out = folder / "head"
    shutil.copytree(CP, out)
    model = next(out.glob("model@*"))
    if change:
        state = load_file(model)
        change(state)
        save_file(state, model)
    return model


def poison(value: float) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[EMISSIONS].reshape(-1)[7] = value

    return change


def unknown(state: dict[str, Any]) -> None:
    state["mt_head._sum_weights_heads.0.head.identity"] = np.eye(4, dtype=np.float32)


def mask(state: dict[str, Any]) -> None:
    state["circuit._identity_mask"] = np.eye(8, dtype=np.bool_)


def outside(state: dict[str, Any]) -> None:
    state["hmm_identity_bias"] = np.eye(4, dtype=np.float32)


def published(state: dict[str, Any]) -> None:
    """What lies beside head and circuit in published files, and is not part of the function."""
    for name in ("circuit._autoregressive_mar_mask", "circuit._univariate_mar_mask"):
        state[name] = np.ones((8, 8), np.bool_)
    state["_exp_gamma_weights"] = np.ones(8, np.float32)
    state["lm._lm.head.lm_head.weight"] = np.ones((8, 8), np.float32)


def narrow(state: dict[str, Any]) -> None:
    state[EMISSIONS] = np.ascontiguousarray(state[EMISSIONS][:, :3])


def flat(state: dict[str, Any]) -> None:
    state[EMISSIONS] = state[EMISSIONS].reshape(-1)


@pytest.mark.parametrize(
    ("code", "change", "words"),
    [
        ("F112", poison(np.nan), EMISSIONS),
        ("F112", poison(np.inf), EMISSIONS),
        ("F111", unknown, "mt_head._sum_weights_heads.0.head.identity"),
        ("F111", mask, "circuit._identity_mask"),
        ("F111", outside, "hmm_identity_bias"),
        ("F113", narrow, "(8, 3, 128, 32)"),
        ("F113", flat, "expected"),
    ],
)
def test_tensors(
    arena: Arena, code: str, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    checkpoint(arena.folder, change)
    assert words in arena.refuses(code, "compile", "head", "-o", "m.pcc")


def test_an_unknown_tensor_only_under_the_option(arena: Arena) -> None:
    checkpoint(arena.folder, unknown)
    name = "mt_head._sum_weights_heads.0.head.identity"
    arena.refuses("F117", "compile", "head", "--hmm-bias", "mt_head.absent=0")
    arena.refuses("F117", "compile", "head", "--hmm-bias", f"{name}=3")
    arena.refuses("F117", "compile", "head", "--hmm-bias", f"{name}=0")  # [4,4] is not [1,1,4]


def test_tensors_that_may_lie_beside_the_head(arena: Arena) -> None:
    checkpoint(arena.folder, published)
    done = arena.command("compile", "head", "--query", "prefix", "-o", "m.pcc")
    assert done.code == 0, done.err


@pytest.mark.parametrize("size", [0, 7, 200, 100_000])
def test_truncated(arena: Arena, size: int) -> None:
    model = checkpoint(arena.folder)
    model.write_bytes(model.read_bytes()[:size])
    arena.refuses("F104", "compile", "head")


def header(entry: Any, length: int | None = None) -> bytes:
    text = json.dumps({EMISSIONS: entry}).encode() if not isinstance(entry, bytes) else entry
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("F104", header({}, 1 << 62)),
        ("F104", header(b"[" * 100_000)),
        ("F104", header(b'{"a":' * 50_000)),
        ("F104", header(b"[1" + b"0" * 5000 + b"]")),
        ("F104", header(b"\xff\xfe")),
        (
            "F104",
            header({"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 62]}),
        ),
        ("F106", header({"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 64]})),
        ("F106", header({"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 64]})),
        ("F106", header({"dtype": "F32", "shape": [0, *[1 << 40] * 5], "data_offsets": [0, 0]})),
        ("F106", header({"dtype": "F32", "shape": [16] + [1] * 99, "data_offsets": [0, 64]})),
        ("F106", header({"dtype": "F32", "shape": [15], "data_offsets": [0, 60]})),
        ("F106", header({"dtype": "F32", "shape": [15], "data_offsets": [4, 64]})),
        ("F106", header({"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]})),
        ("F106", header({"dtype": "F32", "shape": [16.0], "data_offsets": [0, 64]})),
        ("F106", header({"dtype": "F8", "shape": [64], "data_offsets": [0, 64]})),
        ("F106", header({"dtype": "F32", "shape": [16], "data_offsets": [64, 0]})),
        ("F106", header(3)),
    ],
)
def test_safetensors_headers(arena: Arena, code: str, data: bytes) -> None:
    checkpoint(arena.folder).write_bytes(data)
    arena.refuses(code, "compile", "head")


YAML_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("F110", YAML_BOMB),
        ("F110", "circuit: &a {n_token: 8, b: *a}\n"),
        ("F102", "[" * 10_000),
        ("F102", "a: !!python/object/apply:os.system ['touch owned']\n"),
        ("F102", "- 1\n"),
        ("F102", ""),
        ("F102", "a: [1"),
        ("F102", "a: " + "x" * (1 << 20)),
        ("F102", "a: \x00"),
        ("F110", "circuit: {n_token: 8, n_component: 4}\n"),
    ],
)
def test_configurations(arena: Arena, code: str, text: str) -> None:
    checkpoint(arena.folder)
    (arena.folder / "head" / "config.yaml").write_text(text)
    arena.refuses(code, "compile", "head")


def test_unknown_kind(arena: Arena) -> None:
    checkpoint(arena.folder)
    config = arena.folder / "head" / "config.yaml"
    config.write_text(re.sub(r"(kind|name): \S+", r"\1: pyramid", config.read_text()))
    assert "'pyramid'" in arena.refuses("F110", "compile", "head")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (False, 2), (False, 4)])
def test_a_pickle_with_a_payload(arena: Arena, zipped: bool, protocol: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = checkpoint(arena.folder)
    path = model.with_suffix(".pt")
    model.unlink()
    if zipped:
        torch.save({"model_state_dict": {EMISSIONS: Payload()}}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(), protocol=protocol))
    found = arena.refuses("F105", "compile", "head")
    assert "more than tensors: refused" in found
    assert "weights_only" not in found  # torch's advice is to run it
    if zipped:
        path.write_bytes(path.read_bytes()[:60])
        arena.refuses("F104", "compile", "head")
    else:
        path.write_bytes(b"junk" * 20)
        arena.refuses("F104", "compile", "head")


def test_a_pickle_without_torch(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(arena.folder)
    model.rename(model.with_suffix(".pt"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch extra" in arena.refuses("X101", "compile", "head", exit_code=3)


# ------------------------------------------------------------------ .pcir


PRODUCT = PCIR.replace("c.categorical %2 {vars=[1]} : units<1x2>[{1}]",
                       "c.categorical %0 {vars=[0]} : units<1x2>[{0}]")  # fmt: skip


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("E201", PRODUCT),
        ("E005", PCIR.replace("[%1, %3]", "[%1, %4]")),  # a node that is its own operand
        ("E005", PCIR.replace("[%1, %3]", "[%1, %6]")),  # a cycle of two
        ("E002", PCIR.replace("c.hadamard", "c.conjure")),
        ("E003", PCIR.replace("units<1x2>[{0}]", "units<1x3>[{0}]")),
        ("E004", PCIR[: len(PCIR) // 2].rpartition("\n")[0]),
        ("E001", "circuit"),
        ("E004", ""),
        ("E219", PCIR.replace("(0.25 0.75", "(-0.25 1.25")),
        ("E219", PCIR.replace("(0.25 0.75", "(inf 0.75")),
        ("E216", PCIR.replace("cards=[2 3]", "cards=[2 4]")),
        ("E008", PCIR.replace("f32[1,1,2](0.5 0.5)", "#sha256-00")),
    ],
)
def test_circuits(arena: Arena, code: str, text: str) -> None:
    path = arena.folder / "bad.pcir"
    path.write_text(text)
    assert "bad.pcir" in arena.refuses(code, "compile", "bad.pcir", "-o", "m.pcc")
    arena.refuses(code, "opt", "bad.pcir", "-p", "dce")


def test_a_circuit_that_is_no_text(arena: Arena) -> None:
    path = arena.folder / "bad.pcir"
    path.write_bytes(b"\x93NUMPY\x01\x00\xff")
    arena.refuses("E001", "compile", "bad.pcir")
    path.write_bytes(b"(" * 1_000_000)
    arena.refuses("E001", "compile", "bad.pcir")
    path.unlink()
    path.mkdir()
    arena.refuses("F102", "compile", "bad.pcir")
    arena.refuses("E011", "opt", "bad.pcir")
    arena.refuses("E011", "opt", "absent.pcir")


# ------------------------------------------------------------------ bundles and inputs


def test_bundles(arena: Arena, bundle: Path) -> None:
    copy = Path(shutil.copytree(bundle, arena.folder / "copy.pcc"))
    commands = (("inspect", copy), ("verify", copy), ("query", copy, "prefix", "--input", "x.npz"))
    np.savez(arena.folder / "x.npz", x=np.zeros((1, 3), np.int64), context=np.zeros((1, 5)))
    graph = copy / "graphs" / "prefix.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for c in commands:
        assert "prefix.onnx" in arena.refuses("B212", *c)
    graph.write_bytes(data)
    rewrite_manifest(copy, schema_version="1.7", producer="pcc 0.8.0")
    for c in commands:
        assert "pcc 0.8.0" in arena.refuses("B211", *c)
    rewrite_manifest(copy, schema_version="1.0", opset=25)
    for c in commands[1:]:
        found = arena.command(*c)
        assert found.code in (0, 2)  # 25 runs where ONNX Runtime is new enough
    rewrite_manifest(copy, opset=77)
    for c in commands[1:]:
        arena.refuses("B220", *c)
    arena.refuses("B210", "inspect", arena.folder)


CONTEXT = npy("(1, 5)", bytes(40), "<f8")


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("C110", archive(x=npy(f"({10**12},)"))),
        ("C110", archive(x=npy(f"({1 << 62}, {1 << 62})"))),
        ("C111", b""),
        ("C111", b"PK\x03\x04 and no more"),
        ("C111", b"\x93NUMPY"),
        ("C111", archive(x=b"text")),
        ("C111", archive(x=npy("(-1,)", bytes(8)))),
        ("C111", archive(x=npy("__import__('os').mkdir('executed')"))),
        ("C111", archive(x=npy("(" * 500 + ")" * 500))),
        ("C111", archive(x=npy("(1,)", pickle.dumps(Payload()), dtype="|O"))),
        ("R102", archive(self=npy("(1, 3)", bytes(24)))),
        ("R102", archive(query=npy("(1, 3)", bytes(24)))),
        ("R106", archive(x=npy("(1, 3)", bytes(24), "<f8"), context=CONTEXT)),
        ("R104", archive(x=npy("(3,)", bytes(24)), context=CONTEXT)),
        ("R105", archive(x=npy("(1, 3)", b"\x09" * 24), context=CONTEXT)),
        ("R103", archive(x=npy("(1, 3)", bytes(24)))),
    ],
)  # fmt: skip
def test_inputs(arena: Arena, bundle: Path, code: str, data: bytes) -> None:
    (arena.folder / "in.npz").write_bytes(data)
    ask = ("query", bundle, "prefix", "--input", "in.npz", "-o", "out.npz")
    arena.refuses(code, *ask)


# ------------------------------------------------------------------ outputs and environment


def test_outputs(arena: Arena, bundle: Path) -> None:
    (arena.folder / "two.pcir").write_text(PCIR)
    (arena.folder / "there").mkdir()
    arena.refuses("B201", "compile", "two.pcir", "-o", "there")
    arena.refuses("B204", "compile", "two.pcir", "-o", "there", "--force")
    arena.refuses("B202", "compile", "two.pcir", "-o", "no/where.pcc")
    arena.refuses("B203", "compile", "two.pcir", "-o", "/proc/m.pcc")
    arena.refuses("E142", "compile", "two.pcir", "--query", "wish")
    arena.refuses("E140", "compile", "absent")
    np.savez(arena.folder / "x.npz", x=np.zeros((1, 3), np.int64), context=np.zeros((1, 5)))
    ask = ("query", bundle, "prefix", "--input", "x.npz")
    arena.refuses("C112", *ask, "-o", "there")
    arena.refuses("C120", *ask, "-o", "no/out.npz")
    arena.refuses("C120", "opt", "two.pcir", "-o", "no/out.pcir")
    arena.refuses("C120", "opt", "two.pcir", "-p", "fuse-cpt", "--dump-after-change", "two.pcir")


def test_a_full_disk(arena: Arena) -> None:
    """No file may grow beyond a limit, as on a disk that is full: at every limit all goes."""
    (arena.folder / "two.pcir").write_text(PCIR)
    args = [sys.executable, "-P", "-m", "pcc.cli", "compile", "two.pcir", "-o", "m.pcc"]
    before = arena.tree()
    for limit in (0, 3000):
        done = subprocess.run(
            args, capture_output=True, text=True, cwd=arena.folder,
            env=os.environ | {"TMPDIR": str(arena.folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"},
            preexec_fn=lambda n=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)),
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "error[B203]: cannot write the bundle: File too large" in done.stderr
        assert done.stderr.count("\n") == 1
        assert arena.tree() == before


def test_no_runtime_at_all(arena: Arena, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = arena.refuses("X201", "verify", bundle, exit_code=3)
    assert "pip install 'pcc[cpu]'" in found


def test_cuda_on_a_cpu_build(arena: Arena, bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    arena.refuses("X202", "verify", bundle, "--provider", "cuda", exit_code=3)
