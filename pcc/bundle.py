"""The bundle `NAME.pcc/`: what is in it, and how a stranger's bundle is read safely."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pcc.errors import PccError

SCHEMA = (1, 0)
MAX_MANIFEST = 64 << 20
# The first ONNX Runtime release that runs models of an opset.
RUNTIME_OF_OPSET = {17: "1.12", 18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21",
                    23: "1.22", 24: "1.24", 25: "1.25", 26: "1.27"}  # fmt: skip


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """Return the hash of every file below `folder` but the manifest."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder).as_posix(): sha256(p) for p in found}


@contextmanager
def staged(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` on success and vanishes on failure."""
    if out.exists() and not force:
        raise PccError(
            "B201", "the output exists", at=str(out), hint="give another name or --force"
        )
    if not out.parent.is_dir():
        raise PccError("B202", "the output's folder does not exist", at=str(out.parent))
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.chmod(work, 0o755)
    try:
        yield work
        old = None
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old / "old")
        os.replace(work, out)
        if old is not None:
            shutil.rmtree(old)
    except OSError as e:
        raise PccError("B203", f"cannot write the bundle: {e.strerror}", at=str(out)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Add schema and hashes, and write `manifest.json`."""
    full = {"schema_version": ".".join(map(str, SCHEMA)), **manifest, "files": files_of(folder)}
    (folder / "manifest.json").write_text(json.dumps(full, indent=1) + "\n")
    return full


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a bundle's manifest: schema, paths inside the bundle, every file's hash."""
    path = folder / "manifest.json"
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise PccError("B210", "the manifest is too large", at=str(path))
        manifest = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise PccError("B210", f"not a bundle: {e.strerror}", at=str(path)) from None
    except (ValueError, RecursionError):
        raise PccError("B210", "the manifest is not JSON", at=str(path)) from None
    if not isinstance(manifest, dict):
        raise PccError("B210", "the manifest is not an object", at=str(path))
    _schema(manifest, path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("queries"), dict):
        raise PccError("B210", "the manifest lists no files or queries", at=str(path))
    for name, want in files.items():
        if sha256(inside(folder, name)) != want:
            raise PccError(
                "B212",
                f"'{name}' has changed since it was written",
                at=str(folder),
                hint="compile the bundle again",
            )
    return manifest


def _schema(manifest: dict[str, Any], path: Path) -> None:
    try:
        major, minor = map(int, str(manifest.get("schema_version")).split("."))
    except ValueError:
        raise PccError("B211", "the manifest has no schema version", at=str(path)) from None
    if major != SCHEMA[0] or minor > SCHEMA[1] + 1:
        raise PccError(
            "B211",
            f"the bundle has schema {major}.{minor}, this pcc reads {SCHEMA[0]}.{SCHEMA[1]}",
            at=str(path),
            hint=f"it was written by {str(manifest.get('producer'))[:60]!r}: use that release",
        )


def inside(folder: Path, name: str) -> Path:
    """Return the path of a listed file, which must lie inside the bundle."""
    pure = PurePosixPath(name)
    path = folder.joinpath(*pure.parts)
    bad = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name
    if bad or not path.resolve().is_relative_to(folder.resolve()):
        raise PccError("B213", f"'{name[:80]}' leads out of the bundle", at=str(folder))
    if not path.is_file():
        raise PccError("B212", f"'{name[:80]}' is missing", at=str(folder))
    return path
