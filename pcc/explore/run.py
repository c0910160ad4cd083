"""`explore`: every point of the grid, from what is there already to the report."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pcc.environment import installed
from pcc.errors import PccError
from pcc.explore import heads as hd
from pcc.explore import prompts as pr
from pcc.explore.config import Config
from pcc.explore.measure import compile_point, length_needed, measure, now
from pcc.explore.page import page
from pcc.explore.points import Missing, Point, missing, points_of, trainable
from pcc.explore.records import SCHEMA, Failure, Figures, Line, Report, failure_of
from pcc.explore.report import command, report
from pcc.explore.results import Results, exclusive, key_of, write_file
from pcc.explore.training import train
from pcc.runtime.ort import check_provider

Say = Callable[[str], None]
WORK = ".work"  # bundles that are being measured; what a killed run left is removed
PACKAGES = ("pcc", "onnxruntime", "onnxruntime-gpu", "numpy", "onnx")


@dataclass
class Exploration:
    """One run over a grid: `lines` are the keys of its points, in the order of the grid."""

    config: Config
    say: Say
    detail: Say
    again: bool
    results: Results
    prompts: list[bytes]
    context: dict[str, Any]
    show: bool = False  # the progress of training
    total: int = 0  # points at most: a factorised head has fewer than the grid
    keys: list[str] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.results.path.parent

    @property
    def max_seq(self) -> int:
        """Tokens that every engine of this exploration holds."""
        m = self.config.measure
        return length_needed(self.prompts, m.tokens, m.max_seq)

    def run(self) -> None:
        """Measure the heads that are there, then train the missing ones and measure those."""
        found, broken = hd.find(self.config)
        grid, t = self.config.grid, self.config.train
        cells = missing(grid, found)
        axes = (grid.proposal, grid.draft_mode, grid.precision, grid.int8)
        hows = math.prod(map(len, axes))
        extra = len(cells) * hows if t.folder else 0
        self.total = sum(len(points_of(h, grid)) for h in found) + len(broken) + extra
        for name, why in broken:
            self._lost(name, why)
        for head in found:
            if not (points := points_of(head, grid)):
                self.say(f"{head.name}: not in the grid")
            for point in points:
                self._point(head, point)
        if not t.folder:
            self.lacking = [c.name for c in cells]
            return
        names = {h.name for h in found} | {name for name, _ in broken}
        for cell, sizes in trainable(cells, each_n=t.each_n).items():
            self._train(cell, sizes, names)

    def _train(self, cell: Missing, sizes: list[int], names: set[str]) -> None:
        """Train one head and measure it at these n."""
        name = f"{cell.name} (trained)" if cell.name in names else cell.name
        self.say(f"training {name}")
        try:
            folder = train(self.config, cell, progress=self.show)
            head = replace(hd.read(folder), name=name)
        except Exception as e:  # one failed training does not lose the others
            self._lost(name, failure_of(e))
            return
        for point in points_of(head, self.config.grid):
            if point.n in sizes:
                self._point(head, point)

    def _point(self, head: hd.Head, point: Point) -> None:
        c = self.config
        what = {k: v for k, v in asdict(point).items() if k != "head"}
        key = key_of(what, {"head": head.digest, "max_seq": self.max_seq}, asdict(c.measure),
                     self.context)  # fmt: skip
        if key in self.keys:
            return  # the same files under two names
        self.keys.append(key)
        where = point.where()
        if (old := self.results.lines.get(key)) is not None and old["point"] != where:
            self.results.lines[key] = {**old, "point": where}  # the folder has a new name
        if self.results.finished(key) and not self.again:
            self.say(f"{len(self.keys)} of {self.total}: {point.name} (measured before)")
        else:
            self.say(f"{len(self.keys)} of {self.total}: {point.name}")
            self.results.add(self._measured(head, point, key))
        line = self.results.lines[key]
        source = str(head.source) if head.source else None
        self.commands[point.name] = command(line, source, head.n, c, self.max_seq)

    def _measured(self, head: hd.Head, point: Point, key: str) -> Line:
        kept = self.config.keep_bundles
        m, bundle = self.config.measure, self.folder / ("bundles" if kept else WORK) / f"{key}.pcc"
        figures: Figures | None = None
        error: Failure | None = None
        status = "ok"
        try:
            bundle.parent.mkdir(exist_ok=True)
            took = compile_point(
                head.source, point, head.n, self.config.verifier, m, self.max_seq, bundle,
                self.detail,
            )  # fmt: skip
            figures = measure(bundle, self.prompts, m, took, self.detail)
            status = "different" if figures["sameness"]["different"] else "ok"
        except Exception as e:  # one failed point does not lose the others
            status, error = "failed", failure_of(e)
            self.say(f"{point.name}: failed: {error['code']}: {error['what']}")
        finally:
            if not kept:
                shutil.rmtree(bundle.parent, ignore_errors=True)
        return _line(key, status, point, figures, error)

    def _lost(self, name: str, why: Failure) -> None:
        """Record a head that could not be read or trained."""
        self.say(f"{name}: failed: {why['code']}: {why['what']}")
        point = Point(name, "", 0, 0, 0)
        key = key_of({"no head": name}, self.context)
        self.keys.append(key)
        self.results.add(_line(key, "failed", point, None, why))

    def report(self, *, complete: bool) -> Report:
        """Write report.json and index.html of what is measured so far; return the report."""
        lines = [self.results.lines[k] for k in self.keys if k in self.results.lines]
        made = report(
            self.config, lines, self.context, self.commands, self.lacking, complete=complete
        )
        write_file(self.folder / "report.json", made)
        write_file(self.folder / "index.html", page(made))
        return made


def _context(config: Config, prompts: list[bytes]) -> dict[str, Any]:
    """Return what a result is only comparable under."""
    return {
        "verifier": hd.verifier_digest(Path(config.verifier)),
        "prompts": pr.digest(prompts),
        "versions": {n: v for n in PACKAGES if (v := installed(n))},
        "machine": machine(),
        "schema": SCHEMA,
    }


def explore(
    config: Config,
    *,
    again: bool = False,
    progress: Say | None = None,
    detail: Say | None = None,
) -> Report:
    """Measure what is not measured yet; return the report, which is also in the folder `out`.

    `again` measures everything anew. `progress` is told of each point, `detail` of its stages. An
    interruption (Ctrl-C) leaves the report of what is there and is raised again. Errors: G1xx,
    M101, X2xx; what fails at one point is recorded there.
    """
    say, tell = progress or _silent, detail or _silent
    check_provider(config.measure.provider)
    folder = Path(config.out)
    prompts = pr.read(config.prompts)
    context = _context(config, prompts)
    with exclusive(folder):
        shutil.rmtree(folder / WORK, ignore_errors=True)
        results = Results(folder / "results.jsonl")
        if results.ignored:
            say(f"{results.path}: {results.ignored} damaged lines do not count")
        work = Exploration(
            config, say, tell, again, results, prompts, context, progress is not None
        )
        try:
            work.run()
        except BaseException as e:
            if work.keys and not isinstance(e, PccError):
                work.report(complete=False)
            raise
        if not work.keys:
            hint = "compare the axes with the heads (architecture, n, r, lora_layers)"
            raise PccError("G102", "no head fits the grid", at=config.out, hint=hint)
        return work.report(complete=True)


def _silent(_: str) -> None:
    pass


def machine() -> dict[str, Any]:
    """Return what times depend on: processor, number of cores, system."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            model = next(
                (x.split(":", 1)[1].strip() for x in f if x.startswith("model name")), model
            )
    except OSError:
        pass
    return {"processor": model, "cores": os.cpu_count() or 0, "system": platform.system(),
            "architecture": platform.machine()}  # fmt: skip


def _line(
    key: str, status: str, point: Point, figures: Figures | None, error: Failure | None
) -> Line:
    return {
        "schema": SCHEMA, "key": key, "time": now(), "status": status, "point": point.where(),
        "figures": figures, "error": error,
    }  # fmt: skip
