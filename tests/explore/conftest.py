"""A tiny verifier, heads as checkpoint folders, prompts, and configurations of explorations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from pcc.explore import Config, build

EMISSIONS = "mt_head._categorical_log_probs_heads.0.head.proj"
SCOPE = "circuit._circuit._nodes.0._scope_idx"


def checkpoint(path: Path, kind: str, n: int, r: int, seed: int = 0) -> Path:
    """Write a head folder in the published layout: ff or cp, right some of the time."""
    rng = np.random.default_rng([seed, n, r])
    wide = engines.outputs(258, 0, n)[:, None] * 2
    noise = 0.05 * rng.normal(size=(n, r, 258, engines.WIDTH))
    tensors = {EMISSIONS: (wide + noise).astype(np.float32)}
    if kind == "cp":
        name = "mt_head._sum_weights_heads.0.head.proj"
        tensors[name] = (rng.normal(size=(1, 1, r, engines.WIDTH)) / 3).astype(np.float32)
    path.mkdir(parents=True)
    save_file(tensors | {SCOPE: np.arange(n)[:, None]}, path / "model@1.safetensors")
    config = {
        "circuit": {"name": kind, "n_token": n, "n_component": r},
        "data": {"vocab_size": 258},
        "mt_head": {"hyperparameters": {"n_embd": engines.WIDTH, "expander_type": "linear"}},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `heads/ff4`, `heads/cp4` and `prompts.txt`."""
    root = tmp_path_factory.mktemp("explore")
    engines.llama_folder(root / "model")
    checkpoint(root / "heads" / "ff4", "ff", 4, 1)
    checkpoint(root / "heads" / "cp4", "cp", 4, 2)
    (root / "heads" / "notes.txt").write_text("no head")
    (root / "prompts.txt").write_bytes(b"def f(\n\nclass A\nimport os\nwhile \xff\n")
    return root


@pytest.fixture(scope="session")
def setting(ground: Path) -> Callable[..., dict[str, Any]]:
    """`setting(out, **more)` is a small configuration as YAML has it."""

    def make(out: Path, **more: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "verifier": str(ground / "model"),
            "prompts": {"path": str(ground / "prompts.txt"), "limit": 3},
            "out": str(out),
            "heads": [str(ground / "heads" / "*")],
            "grid": {"n": [3, 4]},
            "measure": {"tokens": 12, "repeats": 5, "validate": False},
        }
        return base | more

    return make


@pytest.fixture(scope="session")
def config(setting: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """`config(out, **more)` is the same, built."""
    return lambda out, **more: build(setting(out, **more))
