"""Files that are whole or absent: written beside their place, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pcc.errors import PccError
from pcc.files import finite
from pcc.frontends.scaled import dequantise

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write(path: Path, data: bytes) -> None:
    """Replace a file atomically; on failure the old one stays. Errors: N130."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        what = f"cannot write {len(data)} bytes: {e.strerror or e}"
        hint = "make room and run the same command again: it resumes from the last checkpoint"
        raise PccError("N130", what, at=str(path), hint=hint) from None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; what is not finite becomes null."""
    write(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    meta: Mapping[str, str] | None = None,
) -> None:
    """Write safetensors; floating values as `dtype` where one is given. Errors: N130, N131."""
    plain = {}
    for name, value in tensors.items():
        x = value.detach().cpu().contiguous()
        if x.is_floating_point():  # cast here or by the caller: what overflowed is infinite
            y = x if dtype is None else x.to(dtype)
            if not torch.isfinite(y).all():
                hint = "store it as bf16 or f32 (run.storage)"
                if x.dtype == torch.float32 and not torch.isfinite(x).all():
                    hint = "the numbers themselves are not finite; lower optim.lr"
                raise PccError("N131", f"{name} does not fit {y.dtype}", at=str(path), hint=hint)
            x = y
        plain[name] = x.clone()
    write(path, in_order(save(plain, metadata=dict(meta) if meta else None)))


def in_order(data: bytes) -> bytes:
    """Return safetensors with its metadata by name: equal content has equal bytes, and one hash.

    The library writes them in the order of a hash map, another one in each process.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if meta := header.pop("__metadata__", None):
        header = {"__metadata__": dict(sorted(meta.items()))} | header
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors and the metadata of a safetensors file. Errors: N132."""
    try:
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
            return {k: f.get_tensor(k) for k in f.keys()}, meta
    except FileNotFoundError:
        raise PccError("N132", "the file does not exist", at=str(path)) from None
    except (OSError, SafetensorError) as e:
        what = f"not a readable safetensors file: {e}"[:200]
        raise PccError("N132", what, at=str(path)) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return all tensors, rows of integers as float32. Errors: N132, F113."""
    stored, _ = read_tensors(path)
    if not any(x.dtype in (torch.int8, torch.uint8) for x in stored.values()):
        return stored
    named = dequantise({k: v.numpy() for k, v in stored.items()}, str(path))
    return {k: torch.from_numpy(v) for k, v in named.items()}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. Errors: N132."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise PccError("N132", f"cannot read: {e.strerror or e}", at=str(path)) from None


def newest(folder: Path, pattern: str, number: Callable[[Path], int]) -> Path | None:
    """Return the file with the largest number, if any."""
    return max(folder.glob(pattern), key=number, default=None)
