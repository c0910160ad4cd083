"""How an engine is built: choices that are recorded in the manifest."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pcc.backends.tensorrt.runtimes import TensorRt
from pcc.errors import PccError

REFITS = ("none", "refit", "refit_identical")
LEAST = 1 << 20  # bytes of a workspace
MOST = 1024  # layers of an engine, and engines at a time


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    `refit`: weights can be exchanged (`refit_identical`: for equal ones only, at no cost of speed).
    `strip`: a plan without weights, filled at loading; needs `refit`. `version_compatible`: runs
    under later releases. `hardware`: "none" (the GPU of the build), or what the runtime has of
    "same" compute capability and "ampere_plus". `capability`: for builders that work without a GPU,
    "8.9". `level`: 0 to 5, how long tactics are searched. `workspace`: bytes that tactics may use.
    `timing_cache`: measurements of tactics, shared by builds; `timings`: the file of an earlier
    one. `profiles`: the verifier's pass is one engine, with an optimisation profile for each number
    of tokens but 1, which rounds and prompts share. `layers`: of a verifier at most so many are in
    one engine, 0 for all; engines of a query run one after the other. `jobs`: engines built at a
    time, each by a process of its own if more than one. `plans`: a bundle whose plans, built with
    `refit`, are taken over for other weights. `keep_onnx`: the graphs stay in the bundle. `only`:
    names of queries, with commas, that get an engine; the others stay graphs, which nothing here
    runs.
    """

    refit: str = "none"
    strip: bool = False
    version_compatible: bool = False
    hardware: str = "none"
    capability: str = "8.9"
    level: int = 3
    workspace: int = 4 << 30
    timing_cache: bool = True
    timings: str = ""
    profiles: bool = False
    layers: int = 0
    jobs: int = 1
    plans: str = ""
    keep_onnx: bool = True
    only: str = ""

    @staticmethod
    def of(given: Mapping[str, Any]) -> BuildOptions:
        """Return options by name; text is read as the type of the default. Errors: E430."""
        known = asdict(BuildOptions())
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                have = ", ".join(known)
                raise PccError("E430", f"no engine option is called {str(name)[:40]!r}",
                               hint=f"known are {have}")  # fmt: skip
            values[name] = _read(name, value, type(known[name]))
        return BuildOptions(**values)

    def builds(self, query: str) -> bool:
        """Whether a query gets an engine."""
        return not self.only or query in self._named()

    def _named(self) -> list[str]:
        return [name.strip() for name in self.only.split(",")]

    def check_names(self, queries: Collection[str]) -> None:
        """Refuse names of `only` that are no graphs of the bundle. Errors: E430."""
        unknown = [name for name in self._named() if name not in queries] if self.only else []
        if unknown:
            what = f"only={unknown[0][:40]!r} is no graph of this bundle"
            raise PccError("E430", what, hint=f"its graphs are {', '.join(queries)}")

    def check(self, r: TensorRt) -> None:
        """Refuse what a runtime lacks, and choices that exclude each other. Errors: E430."""
        self._in_range(r)
        lacking = [k for k in self._wanted() if k not in r.options]
        plain = BuildOptions()
        lacking += ["capability"] * (not r.offline and self.capability != plain.capability)
        lacking += ["timings"] * (not r.timings and self.timings != plain.timings)
        if lacking:
            have = ", ".join((*r.options, *["capability"] * r.offline, *["timings"] * r.timings))
            raise PccError("E430", f"TensorRT {r.name} has no option {lacking[0]}",
                           hint=f"it has {have}")  # fmt: skip
        if self.strip and self.refit == "none":
            raise PccError("E430", "a stripped plan must be refitted", hint="give refit too")
        if (self.strip or self.only) and not self.keep_onnx:
            raise PccError("E430", "weights of stripped plans, and queries without an engine, "
                           "stay graphs", hint="keep_onnx=True")  # fmt: skip

    def _in_range(self, r: TensorRt) -> None:
        """Refuse the first option whose value a runtime does not take."""
        for name, good, takes in (
            ("refit", self.refit in REFITS, f"one of {', '.join(REFITS)}"),
            ("hardware", self.hardware in ("none", *r.hardware),
             f"one of {', '.join(('none', *r.hardware))}"),
            ("level", 0 <= self.level <= 5, "0 to 5"),
            ("layers", 0 <= self.layers <= MOST, f"0 to {MOST}"),
            ("jobs", 1 <= self.jobs <= MOST, f"1 to {MOST}"),
            ("capability", re.fullmatch(r"[0-9]{1,2}\.[0-9]", self.capability), "like 8.9"),
            ("workspace", LEAST <= self.workspace < 1 << 63, f"at least {LEAST} bytes"),
        ):  # fmt: skip
            if not good:
                value = str(getattr(self, name))[:40]
                what = f"TensorRT {r.name} takes no {name}={value!r}"
                raise PccError("E430", what, hint=f"it takes {takes}")

    def flags(self, r: TensorRt) -> list[str]:
        """Return the builder flags of these options, by their names in this release."""
        out = list(r.always)
        for option in self._wanted():
            out += r.options[option]
        return out

    def _wanted(self) -> list[str]:
        wanted = [self.refit] * (self.refit != "none")
        return wanted + [k for k in ("strip", "version_compatible") if getattr(self, k)]

    def document(self) -> dict[str, Any]:
        """Return the options as plain data; by how many processes it is built is no part of it."""
        return {k: v for k, v in asdict(self).items() if k != "jobs"}


def _read(name: str, value: Any, kind: type) -> Any:
    if type(value) is kind:
        return value
    text = str(value)[:60]
    if kind is bool and text.lower() in ("true", "1", "yes", "false", "0", "no"):
        return text.lower() in ("true", "1", "yes")
    if kind is int and type(value) is str and text.isascii() and text.isdigit():
        return int(text)
    raise PccError("E430", f"{name}={text!r} is no {kind.__name__}")
