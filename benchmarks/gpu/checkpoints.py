"""Prepare a folder of published checkpoints for GPU machines: no pickles, and the CPU's texts.

    python benchmarks/gpu/checkpoints.py FOLDER --out OUT

Of each checkpoint `config.yaml` and its weights as safetensors (TensorRT 8.6 has a Python without
torch), of each model beside them `config.json` and `model.safetensors`; `expected.json` holds the
texts of `pcc conformance --checkpoints OUT` in fp32, of one row and of three, as ONNX Runtime makes
them on this machine. `run_h200.py --checkpoints OUT` compares with them. Needs torch.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from pcc.conformance.published import published  # noqa: E402
from pcc.conformance.suite import expectations  # noqa: E402
from pcc.conformance.texts import write  # noqa: E402
from pcc.frontends.state import find_model  # noqa: E402

MODEL = ("config.json", "model.safetensors")
HEAD = "config.yaml"


def prepare(folder: Path, out: Path) -> None:
    """Copy the checkpoints and models of a folder; weights become safetensors."""
    for source in sorted(p for p in folder.iterdir() if p.is_dir()):
        kept = [source / name for name in (HEAD, *MODEL) if (source / name).is_file()]
        if not kept:
            continue
        place = out / source.name
        place.mkdir(parents=True)
        for path in kept:
            shutil.copyfile(path, place / path.name)
        if (source / HEAD).is_file():
            weights(find_model(source), place)


def weights(path: Path, place: Path) -> None:
    """Write a checkpoint's weights as safetensors; what is not there (a backbone) stays away."""
    if path.suffix == ".safetensors":
        shutil.copyfile(path, place / path.name)
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("model_state_dict", state)
    tensors = {k: v.contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, place / f"{path.stem}.safetensors")


def main() -> None:
    """Prepare the folder that is named."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder", type=Path)
    p.add_argument("--out", type=Path, required=True, help="a new folder")
    a = p.parse_args()
    if not a.folder.is_dir():
        p.error(f"{a.folder} is no folder")
    if a.out.exists() or not a.out.parent.is_dir():
        p.error(f"{a.out} exists, or its folder does not: name a new one")
    a.out.mkdir()
    prepare(a.folder, a.out)
    scenarios = tuple(replace(s, precisions=("fp32",)) for s in published(a.out))
    texts = expectations(print, (1, 3), scenarios)
    write(a.out / "expected.json", texts)


if __name__ == "__main__":
    main()
