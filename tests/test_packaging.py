"""The wheel ships every package, under one name only; imports point one way and stay cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pcc

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(pcc.__file__).parent

LEAVES = {"errors", "knobs"}  # imported by every part, and import none
SHARED = LEAVES | {"ir", "files"}
LEVELS = SHARED | {"circuit", "tensor"}
CORE = LEVELS | {"interp"}
LOADED = CORE | {"bundle", "samples"}  # what a loaded engine may use: no compiler
BUILT = LOADED | {"frontends", "passes", "models", "backends", "runtime", "check", "environment"}
BUILT |= {"targets", "emission", "shapes", "variants"}
# part: the other parts it may import. `pcc/__init__.py` is exempt: it holds the public names.
MAY_IMPORT = {
    "errors": set[str](),
    "knobs": set[str](),
    "files": LEAVES,
    "targets": LEAVES,
    "shapes": CORE | {"frontends", "models"},
    "emission": LEVELS | {"targets"},
    "ir": LEAVES,
    "tensor": SHARED,
    "circuit": SHARED | {"tensor"},  # parameters are tensor expressions
    "interp": LEVELS,
    "frontends": CORE,
    "passes": CORE,
    "models": CORE | {"passes", "frontends", "targets"},  # frontends: the safetensors reader
    "backends": CORE | {"passes", "models", "targets", "emission", "bundle", "variants"},
    "bundle": LEAVES | {"files"},
    "variants": LEAVES | {"files"},
    "prompts": LEAVES | {"files"},
    "samples": CORE | {"runtime"},
    "runtime": CORE | {"bundle", "variants"},
    "stored": CORE | {"bundle"},
    "ties": LEAVES,
    "check_generation": LOADED | {"runtime", "stored", "ties"},
    "check": LOADED | {"runtime", "stored", "check_generation"},
    "environment": LOADED | {"runtime"},
    "generation": BUILT,
    "package": BUILT | {"driver", "__init__"},  # driver: the type of a job
    "arguments": BUILT,
    "driver": BUILT | {"arguments", "generation", "package"},
    "exchange": BUILT | {"driver"},
    "conformance": BUILT
    | {"driver", "generation", "package", "stored", "check_generation", "ties"},
    "train": BUILT | {"driver"},
    "explore": BUILT | {"driver", "generation", "train", "prompts"},
    "cli": BUILT
    | {"arguments", "driver", "train", "explore", "prompts", "conformance", "__init__"},
}
TORCH_PARTS = {"train", "frontends"}
HEAVY = ("torch", "onnx", "onnx_ir", "sympy", "onnxruntime", "networkx")


def sources() -> Iterator[tuple[str, Path]]:
    """Yield (part, file) for each module of pcc; links are not followed, so each file once."""
    folders: list[tuple[Path, str | None]] = [(PACKAGE, None)]
    for linked in ("passes", "backends"):
        folders.append(((PACKAGE / linked).resolve(), linked))
    for folder, part in folders:
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder)
            if part is None and inside.parts[0] in ("passes", "backends"):
                continue
            yield part or inside.with_suffix("").parts[0], file


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of each import below `tree`, nested ones included."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield alias.name, node.lineno
            case ast.ImportFrom(module=str(module), names=names):
                for alias in names:
                    yield f"{module}.{alias.name}", node.lineno
            case _:
                pass


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module loads: not function bodies, not TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case _:
                pass
        yield node
        yield from at_import_time(node)


def complaints(part: str, text: str) -> list[str]:
    """Return what is wrong with the imports of a module of `part`."""
    found = []
    tree = ast.parse(text)
    for name, line in imports(tree):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        known = target in MAY_IMPORT
        if top == "pcc" and part != "__init__":
            target = target if known else "__init__"
            if target != part and target not in MAY_IMPORT[part]:
                found.append(f"line {line}: {part} may not import pcc.{target}")
        if top == "torch" and part not in TORCH_PARTS:
            found.append(f"line {line}: torch belongs in {sorted(TORCH_PARTS)}")
    for node in at_import_time(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and part != "train":
            for name, line in imports(node):
                if name.partition(".")[0] == "torch":
                    found.append(f"line {line}: import torch where it is used, not at the top")
    return found


def test_every_package_is_listed() -> None:
    conf = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for pkg, folder in conf["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([pkg, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(conf["packages"]) == found


def test_every_folder_of_modules_is_a_package() -> None:
    for _, file in sources():
        assert (file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py"


@pytest.mark.wheel
@pytest.mark.parametrize("name", ["passes", "backends"])
def test_folders_are_not_top_level(name: str, tmp_path: Path) -> None:
    """What is installed gives neither name to anybody.

    In a process of its own: in this one the answer depends on `sys.path` and on what other tests
    imported. `tests/` on the path, for one, makes a namespace package of `tests/passes`.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_guard_holds_in_the_root_folder(name: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import this package as 'pcc.{name}'" in done.stderr


@pytest.mark.wheel
def test_imports_point_one_way() -> None:
    found = []
    for part, file in sources():
        assert part == "__init__" or part in MAY_IMPORT, f"say in MAY_IMPORT where {part} belongs"
        found += [f"{file.name}: {text}" for text in complaints(part, file.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.wheel
@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("ir", "import pcc.circuit.ops"),
        ("ir", "from pcc import tensor"),
        ("tensor", "from pcc.circuit.ops import Dense"),
        ("interp", "def f():\n    from pcc.passes.manager import Pass"),
        ("passes", "import pcc"),
        ("frontends", "from pcc.passes import manager"),
        ("runtime", "from pcc.driver import compile"),
        ("runtime", "from pcc.backends.onnx import emit"),
        ("driver", "from pcc.cli import main"),
        ("errors", "from pcc.ir.core import Op"),
        ("frontends", "import torch"),
        ("frontends", "try:\n    from torch import nn\nexcept ImportError:\n    pass"),
        ("interp", "def f():\n    import torch"),
    ],
)
def test_wrong_imports_are_found(part: str, text: str) -> None:
    assert complaints(part, text)


@pytest.mark.wheel
@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("passes", "from pcc.passes.manager import Pass\nfrom pcc.interp import run"),
        ("frontends", "def load():\n    import torch"),
        ("train", "import torch"),
        ("circuit", "from pcc.tensor.ops import Input"),
        ("cli", "import pcc"),
    ],
)
def test_right_imports_pass(part: str, text: str) -> None:
    assert not complaints(part, text)


@pytest.mark.wheel
def test_import_is_cheap() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import pcc; "
        "print(f'import pcc: {time.perf_counter() - start:.3f} s'); "
        f"sys.exit(', '.join(m for m in {HEAVY!r} if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"import pcc imports {done.stderr}"
