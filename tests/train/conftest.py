"""What all training tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with packed data, a trained toy backbone and its continuations."""
    pytest.importorskip("torch", reason="torch is not installed")
    from training import TEXT, backbone

    from pcc.train import cli, data
    from pcc.train import config as cfg

    root = tmp_path_factory.mktemp("train")
    data.save_packed(root / "d.npz", TEXT, {"held": b"def h(y):\n    return y - 1\n" * 30})
    cli.run(cfg.build(backbone(root, root / "backbone")), progress=False)
    cli.run(
        cfg.build(
            {
                "kind": "greedy", "out": str(root / "g.safetensors"), "run": {"device": "cpu"},
                "backbone": str(root / "backbone"), "data": {"packed": str(root / "d.npz")},
                "greedy": {"rows": 6, "batch": 4, "prompt": 16, "length": 24},
            }
        ),
        progress=False,
    )  # fmt: skip
    return root
