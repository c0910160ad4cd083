"""Read a published checkpoint folder: ``config.yaml`` and the newest ``model@<step>`` file.

The data are hostile until proven otherwise: the configuration is read with the safe YAML loader,
the pickle with torch's ``weights_only`` reader, safetensors with the bounded reader below.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.files import open_regular, read_bounded
from pcc.frontends.unread import LARGE, Unread
from pcc.ir.recipe import named
from pcc.knobs import MAX_EXTENT, MAX_HEADER_BYTES, MAX_RANK, MAX_YAML_BYTES

State = dict[str, Any]  # arrays, `Unread` tensors where they are asked for, None

_PREFIXES = ("_orig_mod.", "module.")
_KEPT = ("mt_head.", "circuit.")
_NAME = re.compile(r"model@(\d{1,18})\.(pt|safetensors)")
_GLOBAL = re.compile(r"GLOBAL ([\w.]{1,80})")
_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\}")
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


def read_state(
    folder: str | Path,
    *,
    step: int | None = None,
    keep: tuple[str, ...] = (),
    unread: bool = False,
) -> tuple[dict[str, Any], State, Path]:
    """Read configuration and tensors of one checkpoint folder.

    Tensors of the head and the circuit, and those named in ``keep``, come back as arrays (bf16 and
    fp16 widened exactly to float32); every other name maps to None. The newest step wins unless
    ``step`` is given; at one step safetensors is preferred, as it needs no torch. With ``unread``,
    large floating-point tensors come back as `Unread`.

    Errors: F101 to F109 (files, configuration, tensors), X101 (torch missing).
    Source: published checkpoint layout, ``config.yaml`` + ``model@<step>.pt``.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PccError("F101", "the checkpoint folder does not exist", at=str(folder))
    config = read_config(root / "config.yaml")
    path = find_model(root, step)
    wanted = _keeper(keep)
    if path.stat().st_size == 0:
        raise PccError("F104", "the file is empty", at=str(path), hint="copy the checkpoint again")
    least = LARGE if unread else sys.maxsize
    read = _read_torch if path.suffix == ".pt" else _read_safetensors
    return config, read(path, wanted, least), path


def read_config(path: Path) -> dict[str, Any]:
    """Parse ``config.yaml`` with the safe loader; at most 1 MiB. Errors: F102, X104."""
    try:  # only checkpoints need it: verifiers and circuits are compiled without
        import yaml  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise PccError("X104", "pyyaml is not installed", hint="pip install pyyaml") from None
    where = str(path)
    try:
        config = yaml.safe_load(read_bounded(path, MAX_YAML_BYTES, "F102").decode("utf-8"))
    except FileNotFoundError:
        hint = "a checkpoint folder holds config.yaml beside model@<step>.pt or .safetensors"
        raise PccError("F102", "config.yaml is missing", at=where, hint=hint) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError, ValueError) as error:
        raise PccError("F102", f"not readable as YAML: {one_line(error)}", at=where) from None
    if not isinstance(config, dict):
        raise PccError("F102", "the configuration is not a mapping", at=where)
    return config


def lookup(config: Mapping[str, Any], key: str, *, at: str = "config.yaml") -> Any:
    """Return the value at a dotted key, references ``${a.b}`` followed; None when absent.

    Nothing else is evaluated: resolvers such as ``${oc.env:X}`` are refused.
    Errors: F103 (cyclic, dangling or unsupported reference).
    """
    seen: list[str] = []
    while True:
        if key in seen:
            chain = " -> ".join([*seen, key])
            raise PccError("F103", f"cyclic reference {chain}", at=at, hint="break the cycle")
        seen.append(key)
        value, rest = _walk(config, key.split("."))
        if not isinstance(value, str) or "${" not in value:
            if rest and len(seen) > 1:
                raise PccError("F103", f"reference to the absent key {key!r}", at=at)
            return None if rest else value
        match = _REFERENCE.fullmatch(value.strip())
        if match is None:
            what = f"{key} is {value[:60]!r}: only a plain reference ${{a.b}} is resolved"
            raise PccError("F103", what, at=at, hint="write the value itself into config.yaml")
        key = ".".join([match.group(1), *rest])


def _walk(config: Mapping[str, Any], parts: list[str]) -> tuple[Any, list[str]]:
    """Follow ``parts`` as far as mappings go; return the value and the parts that are left."""
    value: Any = config
    for index, part in enumerate(parts):
        if not isinstance(value, Mapping) or part not in value:
            return value, parts[index:]
        value = value[part]
    return value, []


def find_model(root: Path, step: int | None = None) -> Path:
    """Return the model file with the newest (or the given) step. Errors: F101."""
    found = [(m, p) for p in sorted(root.iterdir()) if (m := _NAME.fullmatch(p.name))]
    ranked = sorted((int(m[1]), m[2] == "safetensors", p) for m, p in found)
    chosen = [p for number, _, p in ranked if step in (None, number)]
    if not chosen:
        have = ", ".join(p.name for _, _, p in ranked) or "none"
        asked = "model@<step>" if step is None else f"model@{step}"
        what = f"no {asked}.pt or {asked}.safetensors (model files here: {have})"
        raise PccError("F101", what, at=str(root), hint="name a step that exists")
    if not chosen[-1].is_file():
        raise PccError("F101", "not a regular file", at=str(chosen[-1]))
    return chosen[-1]


def step_of(path: Path) -> int:
    """Return the step in a model file's name, -1 when it carries none."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def strip_prefixes(key: str) -> str:
    """Remove the ``_orig_mod.`` and ``module.`` wrappers that training adds to a key."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _keeper(keep: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda key: key.startswith(_KEPT) or key in keep


def _stripped(names: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key without wrapper prefixes, value). Errors: F106 (not a string, or twice)."""
    seen = set()
    for raw, value in names.items():
        key = strip_prefixes(raw) if isinstance(raw, str) else ""
        if not key or key in seen:
            cause = "occurs twice" if key else "is not a text"
            raise PccError("F106", f"the tensor name {raw!r} {cause}", at=str(path))
        seen.add(key)
        yield key, value


# --- torch -------------------------------------------------------------------------------------


def _read_torch(path: Path, wanted: Callable[[str], bool], least: int) -> State:
    """Load ``model@<step>.pt``: a dict with ``model_state_dict`` (or the state itself).

    Errors: F104 (truncated), F105 (refused pickle), F106 (wrong types), X101 (no torch).
    """
    try:
        import torch
    except ImportError:
        hint = "install pcc's torch extra, or convert the file to model@<step>.safetensors"
        raise PccError("X101", "reading a .pt file needs torch", at=str(path), hint=hint) from None
    zipped = _check_archive(path)
    try:
        with warnings.catch_warnings():  # torch's remarks about a pickle that it then refuses
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the reader raises many types on hostile bytes
        raise _refusal(error, path, zipped) from None
    if isinstance(saved, dict) and "model_state_dict" in saved:
        saved = saved["model_state_dict"]
    if not isinstance(saved, dict):
        raise PccError("F106", f"holds a {type(saved).__name__}, not a state dict", at=str(path))
    left, state = path.stat().st_size, State()
    for key, value in _stripped(saved, path):
        state[key] = None
        if wanted(key) and value is not None:
            state[key] = _from_torch(torch, value, left, f"{path}:{key}", least)
            left -= value.numel() * value.element_size()  # else views of one storage add up
    return state


def _refusal(error: Exception, path: Path, zipped: bool) -> PccError:
    """F105 for a whole pickle that holds more than tensors, F104 for broken bytes.

    torch says both in one exception, with paragraphs of advice that is wrong for strangers' files.
    """
    hint = "get the file from its publisher"
    if isinstance(error, pickle.UnpicklingError) and (zipped or _whole_pickle(path)):
        found = _GLOBAL.search(str(error))
        what = "the pickle holds more than tensors: refused" + (f" ({found[1]})" if found else "")
        return PccError("F105", what, at=str(path), hint=hint)
    text = "" if isinstance(error, pickle.UnpicklingError) else f": {one_line(error)}"
    what = f"cannot be read ({type(error).__name__}{text})"
    return PccError("F104", what, at=str(path), hint=hint)


def _whole_pickle(path: Path) -> bool:
    """Return whether a file begins with a pickle that ends; nothing of it is run."""
    try:
        with open_regular(path, "F104") as stream:
            return all(True for _ in pickletools.genops(stream))
    except (ValueError, OverflowError, MemoryError, EOFError):
        return False


def _check_archive(path: Path) -> bool:
    """Return True for a zip archive of sane size. Errors: F104 (broken or compressed archive)."""
    with open_regular(path, "F104") as stream:
        magic = stream.read(4)
    if magic != b"PK\x03\x04":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        what = f"truncated or broken archive ({one_line(error)})"
        raise PccError("F104", what, at=str(path), hint="copy the checkpoint again") from None
    if total > path.stat().st_size:
        raise PccError("F104", f"the archive unpacks to {total} bytes: refused", at=str(path))
    return True


def _from_torch(torch: Any, value: Any, limit: int, at: str, least: int) -> Any:
    """Convert a dense CPU tensor of at most `limit` bytes, or leave it where it is mapped: F106."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise PccError("F106", f"holds a {type(value).__name__}, not a dense tensor", at=at)
    if value.numel() * value.element_size() > limit or value.is_complex():
        what = f"shape {tuple(value.shape)} does not fit the file beside the other tensors"
        raise PccError("F106", what, at=at)
    value = value.detach()
    if value.numel() >= least and value.is_floating_point() and value.is_contiguous():
        flat = value.reshape(-1)
        identity = named("torch", at, id(flat), value.numel())
        # The closure holds the tensor, so that its id stays its own.
        return Unread(tuple(value.shape), lambda i, j: flat[i:j].float().numpy(), identity, at)
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    try:
        return np.ascontiguousarray(value.numpy()).reshape(tuple(value.shape))
    except (TypeError, RuntimeError) as error:
        raise PccError("F106", f"cannot be converted: {one_line(error)}", at=at) from None


# --- safetensors -------------------------------------------------------------------------------


Entry = tuple[str, tuple[int, ...], int]  # dtype, shape, first byte of the data


def _read_safetensors(path: Path, wanted: Callable[[str], bool], least: int) -> State:
    """Read a safetensors file: u64 header length, JSON header, raw little-endian data.

    Errors: F104 (truncated or malformed), F106 (unknown dtype, wrong extent).
    Source: the safetensors format description.
    """
    base, entries = read_header(path)
    return {k: _tensor(path, base, k, e, least) if wanted(k) else None for k, e in entries.items()}


def _tensor(path: Path, base: int, name: str, entry: Entry, least: int) -> Any:
    """Read a tensor, or say where it is if it is large."""
    dtype, shape, begin = entry
    count = math.prod(shape)
    if count < least or not dtype.endswith(("F16", "F32", "F64")):
        return read_tensor(path, base, *entry)
    now = path.stat()
    place = (str(path.resolve()), now.st_size, now.st_mtime_ns, base, entry)

    def read(start: int, stop: int) -> np.ndarray[Any, Any]:
        return read_tensor(path, base, dtype, (count,), begin, start, stop)

    return Unread(shape, read, named(*place), f"{path}:{name}")


def read_header(path: Path) -> tuple[int, dict[str, Entry]]:
    """Return where the data of a safetensors file begin, and its tensors.

    Each byte of the data belongs to one tensor, as the format has it: so all tensors together are
    as large as the file. Errors: F104 (truncated or malformed), F106 (dtypes, extents).
    """
    with open_regular(path, "F104") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            what = f"the header claims {length} bytes of a file of {size}"
            raise PccError("F104", what, at=str(path), hint="copy the checkpoint again")
        try:
            header = json.loads(stream.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            what = f"the header is not JSON: {one_line(error)}"
            raise PccError("F104", what, at=str(path)) from None
    if not isinstance(header, dict):
        raise PccError("F104", "the header is not a mapping", at=str(path))
    header.pop("__metadata__", None)
    room = size - 8 - length
    named = {k: _extent(entry, room, f"{path}:{k}") for k, entry in _stripped(header, path)}
    _check_cover(named, room, str(path))
    return 8 + length, named


def _check_cover(entries: Mapping[str, Entry], room: int, at: str) -> None:
    """Refuse bytes that belong to two tensors or to none. Errors: F106."""
    spans = sorted((begin, begin + _bytes(t, shape), k) for k, (t, shape, begin) in entries.items())
    end = 0
    for begin, stop, name in [*spans, (room, room, "")]:
        if begin < end:
            what = f"its data begin at byte {begin}, within another tensor's"
            raise PccError("F106", what, at=f"{at}:{name}", hint="store the tensors again")
        if begin > end:
            what = f"bytes {end} to {begin} of the data belong to no tensor"
            raise PccError("F106", what, at=at, hint="store the tensors again")
        end = stop


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize


def _extent(entry: Any, room: int, at: str) -> Entry:
    """Check one header entry; return (dtype, shape, begin). Errors: F104, F106."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(span, list) and len(span) == 2
    if not lists or any(type(v) is not int or v < 0 for v in [*shape, *span]):
        raise PccError("F106", "the header entry is malformed", at=at)
    if span[1] > room:
        what = f"data end at byte {span[1]}, the file has {room}: truncated"
        raise PccError("F104", what, at=at, hint="copy the checkpoint again")
    if len(shape) > MAX_RANK or math.prod(v or 1 for v in shape) > MAX_EXTENT:
        what = f"the shape has more than {MAX_RANK} axes or {MAX_EXTENT} numbers"
        raise PccError("F106", what, at=at)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise PccError("F106", f"unsupported dtype {dtype!r}", at=at)
    if span[1] - span[0] != _bytes(dtype, tuple(shape)):
        what = f"{span[1] - span[0]} bytes of data do not make {dtype} of shape {shape}"
        raise PccError("F106", what, at=at)
    return dtype, tuple(shape), span[0]


def read_tensor(
    path: Path,
    base: int,
    dtype: str,
    shape: tuple[int, ...],
    begin: int,
    start: int = 0,
    stop: int | None = None,
) -> np.ndarray[Any, Any]:
    """Read one tensor, or entries `start..stop-1` of its first axis.

    bf16 is the upper half of a float32, so widening it is exact. Errors: F104 (a file that has
    become shorter).
    """
    if stop is not None:
        row = int(np.prod(shape[1:], dtype=np.int64))
        begin += start * row * np.dtype(_DTYPES[dtype]).itemsize
        shape = (stop - start, *shape[1:])
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.fromfile(path, dtype=_DTYPES[dtype], count=count, offset=base + begin)
    if raw.size != count:
        what = "the file has become shorter while it was read"
        raise PccError("F104", what, at=str(path), hint="leave it alone, and compile again")
    if dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        raw = wide.view(np.float32)
    return raw.astype(np.float32).reshape(shape) if dtype == "F16" else raw.reshape(shape)
