"""The bundle `NAME.pcc/`: what is in it, and how a stranger's bundle is read safely.

A manifest is hostile until checked: paths stay inside the folder, every file is listed and every
listed file is there with its SHA-256, links are refused, and what the engine reads of it has the
types and sizes that programs rely on. The manifest holds its own hash, of all its other entries as
canonical JSON. Hashes show damage, not who wrote a bundle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from pcc.errors import PccError
from pcc.files import open_regular, read_bounded
from pcc.knobs import MAX_BATCH, MAX_MANIFEST_BYTES, MAX_ROW_ELEMENTS

SCHEMA = (1, 1)
MANIFEST = "manifest.json"
WEIGHTS = "graphs/weights.bin"  # of all graphs
REFIT = "refit.json"  # beside plans that were taken over: the weights that they are to get
DTYPES = ("f32", "i64", "bool")
HALVES = ("f16", "bf16")  # of states only
ROLES = ("accept", "carry", "latent", "token")  # of uniforms
AGAIN = "compile the bundle again"
# The first ONNX Runtime release that runs models of an opset.
RUNTIME_OF_OPSET = {17: "1.12", 18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21",
                    23: "1.22", 24: "1.24", 25: "1.25", 26: "1.27"}  # fmt: skip


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with open_regular(path, "B212") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def names_of(folder: Path) -> list[str]:
    """Return every file below `folder` but its manifest, without following links."""
    found: list[str] = []
    for at, folders, files in os.walk(folder):
        links = [f for f in folders if os.path.islink(os.path.join(at, f))]
        found += [Path(at, f).relative_to(folder).as_posix() for f in (*files, *links)]
    return sorted(set(found) - {MANIFEST})


@contextmanager
def staged(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` on success and vanishes on failure."""
    _free(out, force)
    work = _beside(out)
    try:  # a signal may arrive at any time
        try:
            os.mkdir(work, 0o700)  # whatever the umask
            os.chmod(work, 0o755)
        except OSError as e:
            raise PccError("B203", f"cannot write here: {e.strerror}", at=str(out.parent)) from None
        yield work
        _publish(work, out)
    except OSError as e:
        raise PccError("B203", f"cannot write the bundle: {e.strerror}", at=str(out)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _free(out: Path, force: bool) -> None:
    """Refuse an output that exists; `force` replaces a bundle, never another folder."""
    if not out.name:
        raise PccError("B202", "this cannot be the name of a bundle", at=str(out))
    if os.path.lexists(out):
        if not force:
            hint = "give another name, or --force to replace it"
            raise PccError("B201", "the output exists", at=str(out), hint=hint)
        if out.is_symlink() or not (out / MANIFEST).is_file():
            hint = "only a bundle is replaced: give another name"
            raise PccError("B204", "the output exists and is no bundle", at=str(out), hint=hint)
    if not out.parent.is_dir():
        raise PccError("B202", "the output's folder does not exist", at=str(out.parent))


def _beside(out: Path) -> Path:
    """Return a name that nothing has: known before it is there, so that no signal leaves it."""
    return out.parent / f".{out.name}.{secrets.token_hex(8)}"


def _publish(work: Path, out: Path) -> None:
    """Let `work` be `out`. What was there stays until then, and comes back should it fail."""
    if not out.exists():
        os.replace(work, out)
        return
    aside = _beside(out)
    try:
        os.replace(out, aside)
        os.replace(work, out)
    finally:
        if os.path.lexists(out):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, out)


def write_manifest(
    folder: Path, manifest: dict[str, Any], known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Add schema and hashes, and write the manifest; `known` hashes are not computed again."""
    known = known or {}
    files = {name: known.get(name) or sha256(folder / name) for name in names_of(folder)}
    full = {"schema_version": ".".join(map(str, SCHEMA)), **manifest, "files": files}
    full["sha256"] = seal(full)
    (folder / MANIFEST).write_text(json.dumps(full, indent=1) + "\n")
    return full


def seal(manifest: dict[str, Any]) -> str:
    """Return the hash of a manifest: of its entries but `sha256`, sorted, without spaces."""
    entries = {k: v for k, v in manifest.items() if k != "sha256"}
    canonical = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a bundle's manifest after checking it, its hash and the hash of every file."""
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise PccError("B210", "not a bundle: it has no manifest.json", at=str(folder))
        data = read_bounded(path, MAX_MANIFEST_BYTES, "B210")
        manifest = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except OSError as e:
        raise PccError("B210", f"not a bundle: {e.strerror}", at=str(path)) from None
    except (ValueError, RecursionError):
        raise PccError("B210", "the manifest is not JSON", at=str(path)) from None
    if not isinstance(manifest, dict):
        raise PccError("B210", "the manifest is not an object", at=str(path))
    _schema(manifest, path)
    _sealed(manifest, path)
    _Reader(str(path)).check(manifest)
    _files(folder, manifest["files"])
    return manifest


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _sealed(manifest: dict[str, Any], path: Path) -> None:
    try:
        whole = manifest.get("sha256") == seal(manifest)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise PccError("B212", "the manifest has changed since it was written", at=str(path),
                       hint=AGAIN)  # fmt: skip


def _schema(manifest: dict[str, Any], path: Path) -> None:
    parts = str(manifest.get("schema_version"))[:40].split(".")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() for p in parts):
        raise PccError("B211", "the manifest has no schema version", at=str(path))
    major, minor = int(parts[0]), int(parts[1])
    if major != SCHEMA[0] or minor > SCHEMA[1]:
        raise PccError(
            "B211",
            f"the bundle has schema {major}.{minor}, this pcc reads up to {SCHEMA[0]}.{SCHEMA[1]}",
            at=str(path),
            hint=f"it was written by {str(manifest.get('producer'))[:60]!r}: use that release",
        )


def _files(folder: Path, files: dict[str, str]) -> None:
    for name, want in files.items():
        if sha256(inside(folder, name)) != want:
            what = f"'{name}' has changed since it was written"
            raise PccError("B212", what, at=str(folder), hint=AGAIN)
    if extra := [n for n in names_of(folder) if n not in files]:
        what = f"'{extra[0][:80]}' is not in the manifest"
        raise PccError("B214", what, at=str(folder), hint=f"remove it, or {AGAIN}")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a listed file, which lies inside the bundle and is no link."""
    pure = PurePosixPath(name)
    bad = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts
    if bad or pure.as_posix() != name:
        raise PccError("B213", f"'{name[:80]}' leads out of the bundle", at=str(folder))
    path = folder
    try:
        for part in pure.parts:
            path = path / part
            if path.is_symlink():
                raise PccError("B213", f"'{name[:80]}' is behind a link", at=str(folder))
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise PccError("B212", f"{name[:80]!r} is missing", at=str(folder))
    return path


class _Reader:
    """Checks the part of a manifest that programs rely on."""

    def __init__(self, at: str) -> None:
        self.at = at

    def need(self, ok: bool, what: str) -> None:
        if not ok:
            hint = "it is damaged, or was not written by pcc"
            raise PccError("B215", f"the manifest's {what}", at=self.at, hint=hint)

    def get(self, parent: dict[str, Any], key: str, kind: type) -> Any:
        value = parent.get(key)
        self.need(type(value) is kind, f"{key!r} is missing or not of type {kind.__name__}")
        return value

    def each(self, values: Any, kinds: tuple[type, ...], what: str) -> None:
        """Need that every value is of one of these types, bool not being an int."""
        self.need(all(type(v) in kinds for v in values), f"{what} is malformed")

    def check(self, m: dict[str, Any]) -> None:
        self.bounded(m)
        files = self.get(m, "files", dict)
        self.each(files.values(), (str,), "'files'")
        self.need(0 <= self.get(m, "opset", int) < 1 << 16, "'opset' is out of range")
        self.get(m, "producer", str)
        numerics = self.get(m, "numerics", dict)
        errors = self.get(numerics, "max_abs_error", dict)
        self.each(errors.values(), (float, int, NoneType), "'max_abs_error'")
        bounds = self.get(numerics, "bound", dict) if "bound" in numerics else {}
        self.each(bounds.values(), (float, int, NoneType), "'bound'")
        for p in self.get(m, "passes", list):
            self.record(p)
        self.each(self.get(m, "unsupported", dict).values(), (str,), "'unsupported'")
        n = self.circuit(self.get(m, "circuit", dict))
        self.vocabulary(self.get(m, "vocabulary", dict))
        for key in ("generation", "verifier"):
            self.need(key in m, f"{key!r} is missing")
            self.each([m.get(key)], (dict, NoneType), repr(key))
        for name, spec in self.get(m, "queries", dict).items():
            self.need(type(spec) is dict, f"query {name[:40]!r} is malformed")
            self.query(spec, n, files)
        # Graphs of one session work on the same rows: a static one writes all of its own.
        batches = {spec.get("batch") for spec in m["queries"].values()}
        self.need(len(batches) < 2, "queries take unlike numbers of rows")

    def bounded(self, whole: Any) -> None:
        """Need integers of 64 bits and finite floats: others are mistakes, or costly to print."""
        left = [whole]
        while left:
            v = left.pop()
            left += v.values() if type(v) is dict else v if type(v) is list else ()
            plain = abs(v) < 1 << 63 if type(v) in (int, float) else True
            self.need(plain, "numbers are too large")

    def circuit(self, circuit: dict[str, Any]) -> int:
        for key in ("name", "kind", "parameters", "structure_hash", "content_hash"):
            self.get(circuit, key, str)
        cards = self.get(circuit, "cards", list)
        n: int = self.get(circuit, "n", int)
        plain = all(type(c) is int and 0 <= c < 1 << 31 for c in cards)
        self.need(plain and n == len(cards) > 0, "'cards' are malformed")
        self.get(circuit, "r", int)
        self.need(self.get(circuit, "V", int) == max(cards), "'V' is not the largest card")
        return n

    def record(self, p: Any) -> None:
        self.need(type(p) is dict, "'passes' is malformed")
        self.each([self.get(p, "name", str), self.get(p, "of", str)], (str,), "'passes'")
        self.get(p, "changed", bool)
        self.each([p.get(k) for k in ("nodes_before", "nodes_after")], (int,), "'passes'")
        self.each([p.get(k) for k in ("ms", "check_ms")], (int, float), "'passes'")
        self.each([p.get("error")], (int, float, NoneType), "'passes'")

    def vocabulary(self, v: dict[str, Any]) -> None:
        self.each(
            [v.get(k) for k in ("byte_offset", "bos", "pad")], (int, NoneType), "'vocabulary'"
        )
        for key in ("eos", "special"):
            self.each(self.get(v, key, list), (int,), f"{key!r}")

    def query(self, spec: dict[str, Any], n: int, files: dict[str, str]) -> None:
        self.need(self.get(spec, "graph", str) in files, "'graph' is not one of its files")
        one = spec.get("one_row")
        self.each([one], (str, NoneType), "'one_row'")
        self.need(one is None or one in files, "'one_row' is not one of its files")
        self.get(spec, "nodes", int)
        batch = self.get(spec, "batch", int) if "batch" in spec else 1
        self.need(0 < batch <= MAX_BATCH, "'batch' is out of range")
        self.each([spec.get("exact", False)], (bool,), "'exact'")
        for key in ("inputs", "outputs"):
            values = self.get(spec, key, list)
            names = [self.value(v) for v in values]
            self.need(len(set(names)) == len(names) > 0, f"{key} are malformed")
            for v in values:
                if v["name"] in ("x", "observed", "target") and key == "inputs":
                    self.need(v["shape"] == ["B", n], f"input {v['name']!r} has another shape")
                elif key == "outputs":
                    self.get(v, "onnx", str)
        # In the graph: an output may have an input's name in the manifest, never an array with it.
        arrays = [i["name"] for i in spec["inputs"]] + [o["onnx"] for o in spec["outputs"]]
        self.need(len(set(arrays)) == len(arrays), "inputs and outputs share an array")
        same = all(o["onnx"] == o["name"] for o in spec["outputs"] if o["name"][:8] == "present.")
        self.need(same, "states have other names in the graph")
        for w in self.get(spec, "weights", list) if "weights" in spec else ():
            self.weight(w)
        if "random" in spec:
            self.slots(self.get(self.get(spec, "random", dict), "slots", list))

    def slots(self, slots: list[Any]) -> None:
        for s in slots:
            self.need(type(s) is dict and s.get("role") in ROLES, "'slots' are malformed")
            self.each([s.get("layer"), s.get("index")], (int,), "'slots'")

    def weight(self, w: Any) -> None:
        """Check where a weight that is an input lies in the weight file."""
        self.need(type(w) is dict, "'weights' are malformed")
        self.get(w, "name", str)
        shape, offset = self.get(w, "shape", list), self.get(w, "offset", int)
        plain = all(type(d) is int and 0 <= d < 1 << 32 for d in shape) and len(shape) < 17
        known = w.get("dtype") in ("f32", *HALVES)
        self.need(plain and known and offset >= 0, "'weights' are malformed")
        self.need(math.prod(shape) < 1 << 40, "'weights' are malformed")

    def value(self, v: Any) -> str:
        self.need(type(v) is dict, "inputs or outputs are malformed")
        state = str(v.get("name")).startswith(("past.", "present."))
        known = (*DTYPES, *HALVES) if state else DTYPES
        self.need(v.get("dtype") in known, f"dtype is not one of {', '.join(known)}")
        first, *rest = self.get(v, "shape", list) or [None]
        # The rows of a state buffer are open: an axis with a name instead of a size.
        sizes = [1 if state and type(d) is str and d.isidentifier() else d for d in rest]
        plain = all(type(d) is int and d >= 0 for d in sizes) and len(rest) < 17
        self.need(first in ("B", "Bc") and plain, "shape is malformed")
        self.need(math.prod(sizes) <= MAX_ROW_ELEMENTS, "shape is too large")
        return str(self.get(v, "name", str))
