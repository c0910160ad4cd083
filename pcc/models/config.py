"""The configuration of a model folder: checked values, special ids, rotary tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pcc.errors import PccError
from pcc.knobs import MAX_MODEL_SIZE
from pcc.models.base import BYTES, Values, Vocabulary, bytes_at
from pcc.models.tensors import read_json


@dataclass(frozen=True)
class Config:
    """`config.json`, with the special ids of `generation_config.json` where that exists."""

    data: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    path: Path

    @property
    def kind(self) -> str:
        """The model type."""
        kind = self.data.get("model_type")
        if not isinstance(kind, str) or not kind:
            self.refuse("model_type", "no model type is given")
        return kind

    def refuse(self, key: str, what: str, hint: str = "", code: str = "M108") -> NoReturn:
        """Raise an error about one key."""
        raise PccError(code, f"{key}: {what}", at=str(self.path), hint=hint)

    def optional(self, key: str) -> Any:
        """Return a value as it is, None if absent."""
        return self.data.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """Return an integer from 0."""
        value = self.data.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value <= MAX_MODEL_SIZE:
            self.refuse(key, f"{value!r} is not an integer within 0..{MAX_MODEL_SIZE}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.count(key, default)
        if value == 0:
            self.refuse(key, "must not be zero")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a finite number from 0."""
        return self.checked(key, self.data.get(key), default)

    def checked(self, key: str, value: Any, default: float | None = None) -> float:
        """Return `value` if it is a finite number from 0."""
        value = default if value is None else value
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not math.isfinite(value) or value < 0:
            self.refuse(key, f"{value!r} is not a number from 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(key, f"{value!r} is neither true nor false")
        return value

    def choice(self, key: str, known: tuple[str, ...], default: str) -> str:
        """Return one of the known texts."""
        value = self.data.get(key)
        value = default if value is None else value
        if value not in known:
            self.refuse(key, f"{value!r} is not supported", f"supported: {', '.join(known)}")
        return str(value)

    def vocabulary(self, size: int, byte_offset: int | None = None) -> Vocabulary:
        """Return what the ids mean.

        Where the architecture does not say which ids are bytes, `byte_offset` in config.json does;
        without it, a vocabulary of 256 to 511 ids begins with the bytes, and a larger one has none.
        """
        if byte_offset is None and self.data.get("byte_offset") is not None:
            byte_offset = self.count("byte_offset")
            if byte_offset + BYTES > size:
                self.refuse("byte_offset", f"bytes from {byte_offset} do not fit {size} ids")
        byte_offset = bytes_at(size) if byte_offset is None else byte_offset
        bos, pad = self._ids("bos_token_id", size), self._ids("pad_token_id", size)
        eos = self._ids("eos_token_id", size)
        special = set(bos) | set(pad) | set(eos) | self._added(size)
        if byte_offset is not None:
            plain = range(byte_offset, byte_offset + BYTES)
            special |= set(range(size)) - set(plain) if size < 2 * BYTES else set()
        return Vocabulary(
            byte_offset,
            bos[0] if bos else None,
            eos,
            pad[0] if pad else None,
            tuple(sorted(special)),
        )

    def _ids(self, key: str, size: int) -> tuple[int, ...]:
        """Return the ids of generation_config.json, else of config.json."""
        value = self.generation.get(key)
        value = self.data.get(key) if value is None else value
        listed = value if isinstance(value, list) else [] if value is None else [value]
        for item in listed:
            # -1 and ids beyond the vocabulary occur where a folder was cut down: they never appear
            if type(item) is not int:
                self.refuse(key, f"{value!r} is no token id")
        return tuple(i for i in listed if 0 <= i < size)

    def _added(self, size: int) -> set[int]:
        added = self.tokenizer.get("added_tokens_decoder")
        keys = added if isinstance(added, dict) else {}
        return {int(k) for k in keys if len(k) < 12 and k.isdecimal() and int(k) < size}


def read_config(folder: Path) -> Config:
    """Read the JSON files of a model folder; config.json must be there. Errors: M101, M102."""
    if not folder.is_dir():
        raise PccError("M101", "the model folder does not exist", at=str(folder))

    def also(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    path = folder / "config.json"
    return Config(
        read_json(path), also("generation_config.json"), also("tokenizer_config.json"), path
    )


# ---------------------------------------------------------------- rotary tables


def tables(config: Config, head_width: int, rows: int) -> tuple[Values, Values]:
    """Return cos and sin of position * frequency, f32[rows, hd/2].

    Angles are products in float32, as the published models were trained with.
    """
    share = config.number("partial_rotary_factor", 1.0)
    turned = int(head_width * share)
    if turned < 2 or turned % 2 or turned > head_width:
        config.refuse("head_dim", f"cannot turn {turned} of {head_width} coordinates in pairs")
    frequency = frequencies(config, turned).astype(np.float32)
    angle = np.arange(rows, dtype=np.float32)[:, None] * frequency
    wide = angle.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def frequencies(config: Config, turned: int) -> Values:
    """Return theta^(-2i/hd), i < hd/2, scaled as config.json says."""
    scaling = config.optional("rope_scaling") or config.optional("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        config.refuse("rope_scaling", "is not a mapping")
    theta = config.optional("rope_theta")
    theta = scaling.get("rope_theta") if theta is None else theta
    theta = positive(config, "rope_theta", theta, 1e4)
    base = theta ** -(np.arange(0, turned, 2) / turned)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return np.asarray(base)
    if kind == "linear":
        return np.asarray(base / positive(config, "rope_scaling.factor", scaling.get("factor")))
    if kind == "llama3":
        return _llama3(config, scaling, base)
    hint = "supported: default, linear, llama3. Frequencies that change with the length would "
    hint += "change the keys that are already in the cache"
    config.refuse("rope_scaling", f"{kind!r} is not supported", hint, "M110")


def positive(config: Config, key: str, value: Any, default: float | None = None) -> float:
    """Return a number that may divide."""
    out = config.checked(key, value, default)
    if not 1e-30 < out < 1e30:
        config.refuse(key, f"{value!r} is not within 1e-30..1e30")
    return out


def _llama3(config: Config, scaling: Mapping[str, Any], base: Values) -> Values:
    """Slow frequencies divided by the factor, fast ones kept, a linear blend in between."""

    def number(key: str) -> float:
        return config.checked(f"rope_scaling.{key}", scaling.get(key))

    factor = positive(config, "rope_scaling.factor", scaling.get("factor"))
    low, high = number("low_freq_factor"), number("high_freq_factor")
    context = number("original_max_position_embeddings")
    if high <= low:
        config.refuse("rope_scaling", "needs high_freq_factor > low_freq_factor")
    turns = context * base / (2 * math.pi)  # over the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - blend) * base / factor + blend * base)
