"""Read a verifier from a folder: config.json and safetensors, no code, no pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pcc.errors import PccError
from pcc.models.base import Model
from pcc.models.config import Config, read_config
from pcc.models.decoder import read_decoder
from pcc.models.tensors import Tensors

Reader = Callable[[Config, Tensors, int], Model]


def _decoder(config: Config, tensors: Tensors, max_rows: int) -> Model:
    return read_decoder(config, tensors, max_rows=max_rows)


READERS: dict[str, Reader] = {
    "llama": _decoder,
    "mistral": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
}


def load_model(folder: Path | str, *, max_rows: int) -> Model:
    """Return the verifier of a folder, for buffers of at most `max_rows` rows.

    `max_rows` = the longest sequence + the widest pass. Errors: M101 to M110, F104, F106.
    """
    root = Path(folder)
    config = read_config(root)
    if max_rows < 1:
        raise PccError("M111", f"{max_rows} rows hold no sequence", at=str(root))
    reader = READERS.get(config.kind)
    if reader is None:
        hint = f"supported model types: {', '.join(READERS)}"
        config.refuse("model_type", f"{config.kind!r} is not supported", hint)
    tensors = Tensors(root)
    model = reader(config, tensors, max_rows)
    tensors.close()
    return model
