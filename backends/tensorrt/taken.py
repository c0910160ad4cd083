"""Plans of an earlier bundle for graphs that differ from its own in trained numbers alone.

A plan that was built with `refit` takes other weights. So a bundle for another head of the same
shapes needs no build: its graphs are written as always, each is compared with the earlier bundle's,
and the plan is taken over; the runtime fills it when it is loaded. Anything but the values of float
constants must be equal: E437 names the first difference.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir

from pcc.backends.tensorrt.build import Built, Sizes
from pcc.backends.tensorrt.compare import Constant, compared
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.bundle import REFIT, inside, read_manifest
from pcc.errors import PccError
from pcc.variants import read_weights, variant_of

DAMAGED = "it is damaged, or was not written by pcc"


class Taken:
    """Gives the plans of an earlier bundle, as `Builder` builds them.

    `weights`: by graph, where each float constant lies and whether it differs from the earlier one.
    Errors: E437 where the plans are of no use, B210 to B215 where the bundle is damaged.
    """

    def __init__(self, r: TensorRt, options: BuildOptions, given: Mapping[str, Any]) -> None:
        self.folder = Path(options.plans)
        self.manifest = read_manifest(self.folder)
        variant = variant_of(self.manifest, str(self.folder))
        if variant["runtime"] != r.name:
            what = f"it has plans for {variant['runtime'][:20]}, not for TensorRT {r.name}"
            raise PccError("E437", what, at=str(self.folder))
        self.runtime, self.arch, self.cache = r, variant["gpu"], b""
        self.options = self._options(variant, given)
        self.module = SimpleNamespace(__version__=variant["version"])
        self.variant = variant
        self.engines, self.profiles = self._engines(), self._profiles()
        self.weights: dict[str, list[Constant]] = {}
        self._otherwise: dict[str, set[str]] = {}

    def _options(self, variant: Mapping[str, Any], given: Mapping[str, Any]) -> BuildOptions:
        """Return the options of the plans; none that are given may say otherwise."""
        try:
            options = BuildOptions.of(variant["options"])
            options.check(self.runtime)
        except PccError as e:
            what = f"the manifest's engine options: {e.what}"
            raise PccError("B215", what, at=str(self.folder), hint=DAMAGED) from None
        for name, value in given.items():
            old = str(getattr(options, name, value))
            free = name in ("plans", "jobs")  # which say nothing about plans
            if not free and str(value).lower() not in (old.lower(), *_words(old)):
                what = f"the plans were built with {name}={old[:40]}, not {str(value)[:40]!r}"
                raise PccError("E437", what, at=str(self.folder))
        if options.refit != "refit":
            what = f"the plans were built with refit={options.refit[:40]}: their weights are fixed"
            hint = "compile the first bundle with --engine refit=refit"
            raise PccError("E437", what, at=str(self.folder), hint=hint)
        if not options.keep_onnx:
            what = "the bundle has not kept its graphs, with which new ones are compared"
            raise PccError("E437", what, at=str(self.folder), hint="compile it with keep_onnx=yes")
        return options

    def build(self, model: ir.Model, path: Path, profiles: Sequence[Sizes] = ()) -> Built:
        """Return the earlier plan of the graph at `path`. Errors: E437 for another graph."""
        name = path.stem
        file = next((f for f in self.engines if Path(f).stem == name), "")
        if not file:
            raise PccError("E437", f"no plan of '{name}' is there", at=str(self.folder))
        if self.profiles.get(file, []) != [dict(p) for p in profiles]:
            raise PccError("E437", f"the plan of '{name}' has other profiles", at=str(self.folder))
        old = inside(self.folder, f"graphs/{name}.onnx")
        self.weights[name] = compared(old, path, name)
        for w in self.weights[name]:  # of a bundle that took its plans from another one
            w.changed = w.changed or w.name in self._changed(file, name)
        made = self.engines[file]
        return Built(self._plan(file), made["layers"], 0.0, [], dict(made["pinned"]))

    def _plan(self, file: str) -> mmap.mmap:
        path = inside(self.folder, file)
        if not path.stat().st_size:
            raise PccError("E437", "the plan is empty", at=str(path), hint="compile it again")
        with path.open("rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def _changed(self, file: str, name: str) -> set[str]:
        """Return the constants that the plan itself has otherwise than the earlier bundle."""
        if not self.variant.get("refit"):
            return set()
        if name not in self._otherwise:
            path = inside(self.folder, f"{Path(file).parent.as_posix()}/{REFIT}")
            listed = read_weights(path, name)
            self._otherwise[name] = {k for k, w in listed.items() if w["changed"]}
        return self._otherwise[name]

    def _need(self, ok: object, what: str) -> None:
        if not ok:
            raise PccError("B215", f"the manifest's {what}", at=str(self.folder), hint=DAMAGED)

    def _engines(self) -> dict[str, Any]:
        """Return what the manifest says of each plan, by its file."""
        found = self.variant.get("engines")
        self._need(isinstance(found, dict), "variant does not list its engines")
        assert isinstance(found, dict)
        for made in found.values():
            pinned = made.get("pinned") if isinstance(made, dict) else None
            self._need(isinstance(pinned, dict) and type(made.get("layers")) is int
                       and all(type(v) is int for v in pinned.values()),
                       "entry of an engine is malformed")  # fmt: skip
        return found

    def _profiles(self) -> dict[str, list[Any]]:
        """Return the shapes of each plan's profiles, by its file."""
        found = self.variant.get("profiles", {})
        plain = isinstance(found, dict) and all(
            isinstance(listed, list) and all(isinstance(p, dict) for p in listed)
            for listed in found.values()
        )
        self._need(plain, "profiles are malformed")
        return {file: [p.get("shapes") for p in listed] for file, listed in found.items()}


def _words(value: str) -> tuple[str, ...]:
    """Return other spellings of a truth value."""
    return {"True": ("yes", "1"), "False": ("no", "0")}.get(value, ())
