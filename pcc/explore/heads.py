"""Heads: what a checkpoint says of itself, and which cells of a grid it fits."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pcc.bundle import sha256
from pcc.driver import load_source
from pcc.errors import PccError
from pcc.explore.config import Config, Grid
from pcc.explore.records import Failure, failure_of
from pcc.knobs import MAX_HEADS

OWN = "own-heads"


@dataclass(frozen=True)
class Head:
    """One head: `n` variables, `r` components (0: unknown), `lora_layers` adapted layers.

    `digest` is the hash of its files; `source` None: the verifier's own heads.
    """

    name: str
    source: Path | None
    architecture: str
    n: int
    r: int
    lora_layers: int
    digest: str

    def fits(self, grid: Grid) -> bool:
        """Return whether the grid has this architecture, r and number of adapted layers."""
        free = self.architecture in ("ff", "custom")  # no r to speak of
        return (
            self.architecture in (grid.architecture or (self.architecture,))
            and (free or self.r in (grid.r or (self.r,)))
            and self.lora_layers in (grid.lora_layers or (self.lora_layers,))
        )

    def windows(self, grid: Grid) -> tuple[int, ...]:
        """Return the n of the grid that this head can draft, or its own."""
        return tuple(n for n in grid.n if n <= self.n) if grid.n else (self.n,)


def find(config: Config) -> tuple[list[Head], list[tuple[str, Failure]]]:
    """Return the heads that the configuration names, and (name, reason) of those unreadable."""
    found: list[Head] = []
    broken: list[tuple[str, Failure]] = []

    def take(name: str, make: Callable[[Path], Head], path: Path) -> None:
        try:
            found.append(make(path))
        except Exception as e:  # one broken head does not lose the others
            broken.append((name, failure_of(e)))

    if config.own_heads:
        take(OWN, own, Path(config.verifier))
    for path in _paths(config.heads):
        take(path.stem if path.suffix == ".pcir" else path.name, read, path)
    return _named(found), broken


def read(path: Path) -> Head:
    """Return the head in a checkpoint folder or a `.pcir` file."""
    if path.is_dir():
        return _checkpoint(path)
    circuit = load_source(path)
    beside = path.with_suffix(".safetensors")
    files = [path, *([beside] if beside.is_file() else [])]
    return Head(path.stem, path, "custom", circuit.n, 0, 0, _digest(files))


def _checkpoint(path: Path) -> Head:
    from pcc.frontends.mtpc_checkpoint import load
    from pcc.models.lora import read_lora

    head, lora = load(path), read_lora(path)
    layers = 0 if lora is None else len({layer for layer, _ in lora.pairs})
    digest = _digest([path / "config.yaml", Path(head.source)])
    return Head(path.name, path, head.kind, head.n, head.r, layers, digest)


def own(verifier: Path) -> Head:
    """Return the verifier's own prediction heads, a fully factorised circuit. Errors: M153."""
    from pcc.generation import Request, own_heads

    n = own_heads(Request(verifier, max_seq=2)).n
    return Head(OWN, None, "ff", n, 1, 0, OWN)


def _paths(patterns: tuple[str, ...]) -> list[Path]:
    """Return what the patterns name, each once and in order. Errors: G103."""
    out: dict[Path, None] = {}
    for pattern in patterns:
        names = (
            sorted(glob.iglob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        )
        whole = [Path(x) for x in names]
        if glob.has_magic(pattern):  # a pattern may match other things beside heads
            whole = [p for p in whole if p.suffix == ".pcir" or (p / "config.yaml").is_file()]
        if not whole:
            hint = "a head is a folder with config.yaml, or a .pcir file"
            raise PccError("G103", "no head has such a name", at=pattern, hint=hint)
        out |= dict.fromkeys(whole)
        if len(out) > MAX_HEADS:
            raise PccError("G103", f"more than {MAX_HEADS} heads", at=pattern)
    return list(out)


def _named(heads: list[Head]) -> list[Head]:
    """Give heads with equal names different ones: the folder above is added."""
    count: dict[str, int] = {}
    for h in heads:
        count[h.name] = count.get(h.name, 0) + 1
    out = [
        replace(h, name=f"{h.source.resolve().parent.name}/{h.name}")
        if h.source is not None and count[h.name] > 1
        else h
        for h in heads
    ]
    used: dict[str, int] = {}
    for i, h in enumerate(out):
        k = used[h.name] = used.get(h.name, 0) + 1
        out[i] = replace(h, name=f"{h.name}#{k}") if k > 1 else h
    return out


def _digest(files: list[Path]) -> str:
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def verifier_digest(folder: Path) -> str:
    """Return the hash of a verifier's configuration and weights. Errors: M101."""
    kinds = {".json", ".yaml", ".safetensors", ".pt", ".bin"}
    files: list[Path] = []
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.is_file())
    if not files:
        raise PccError("M101", "there is no model here", at=str(folder))
    lines: list[Any] = [f"{p.name}:{sha256(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
