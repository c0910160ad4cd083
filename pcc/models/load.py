"""Read a verifier from a folder: config.json and safetensors, no code, no pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pcc.errors import PccError
from pcc.models.base import Model
from pcc.models.byte_llama import read_byte_llama
from pcc.models.config import Config, read_config
from pcc.models.decoder import read_decoder
from pcc.models.evabyte import read_evabyte
from pcc.models.gpt import is_gpt, read_gpt
from pcc.models.lora import Lora, with_draft
from pcc.models.precision import in_precision
from pcc.models.tensors import Source, Tensors
from pcc.targets import HALF_OF


class Described(Protocol):
    """A model that is in no folder."""

    @property
    def config(self) -> Config:
        """What config.json would say."""
        ...

    def weights(self) -> Source:
        """Return its tensors."""
        ...


Reader = Callable[[Config, Source, int], Model]


def _decoder(config: Config, tensors: Source, max_rows: int) -> Model:
    return read_decoder(config, tensors, max_rows=max_rows)


def _evabyte(config: Config, tensors: Source, max_rows: int) -> Model:
    return read_evabyte(config, tensors, max_rows=max_rows)


def _byte_llama(config: Config, tensors: Source, max_rows: int) -> Model:
    return read_byte_llama(config, tensors, max_rows=max_rows)


READERS: dict[str, Reader] = {
    "llama": _decoder,
    "mistral": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
    "evabyte": _evabyte,
    "tpu_llama": _byte_llama,
}


def load_model(
    folder: Path | str | Described,
    *,
    max_rows: int,
    lora: Path | str | Lora | None = None,
    precision: str = "fp32",
    int8: bool = False,
) -> Model:
    """Return the verifier of a folder, for buffers of at most `max_rows` rows.

    `precision`, `int8`: in what its matrices and caches are stored (`pcc.models.precision`).

    `max_rows` = the longest sequence + the widest pass. `lora`: a checkpoint folder (or what was
    read from one) whose adapters, if it has any, make the draft's last layers.
    Errors: M101 to M115, F104, F106; those of the checkpoint; E107 (a weight beyond f16).
    """
    place = Path(folder) if isinstance(folder, str) else folder
    model = with_draft(_read(place, max_rows), lora)
    return in_precision(model, HALF_OF[precision], int8=int8)


def _read(root: Path | Described, max_rows: int) -> Model:
    if max_rows < 1:
        raise PccError("M111", f"{max_rows} rows hold no sequence", at=str(root))
    if isinstance(root, Path) and is_gpt(root):
        return read_gpt(root, max_rows=max_rows)
    config = read_config(root) if isinstance(root, Path) else root.config
    reader = READERS.get(config.kind)
    if reader is None:
        hint = f"supported model types: {', '.join(READERS)}"
        config.refuse("model_type", f"{config.kind!r} is not supported", hint)
    tensors = Tensors(root) if isinstance(root, Path) else root.weights()
    model = reader(config, tensors, max_rows)
    tensors.close()
    return model
