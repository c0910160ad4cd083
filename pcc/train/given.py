"""Files that a head's run is given: greedy text, the backbone's multi-byte heads, `init` heads.

Each is checked before the first step against the backbone and the head that it is used with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcc.errors import PccError
from pcc.frontends.mtpc_checkpoint import SCOPE
from pcc.frontends.provenance import SINGLE, sha256
from pcc.frontends.region_wiring import parse_regions
from pcc.frontends.state import lookup
from pcc.train.backbone import Backbone
from pcc.train.data import Ids
from pcc.train.files import read_tensors
from pcc.train.head import CircuitHead
from pcc.train.layout import NAMES

BACKBONE = "backbone_sha256"  # metadata of greedy files: the weights that continued the text


def read_greedy(path: Path, backbone: Path, model: Backbone, n: int) -> tuple[Ids, int]:
    """Return rows i[R,T] of greedy text and P: the first P ids of each were given, not greedy.

    Errors: N132; N142 (no such file, or of another backbone); N120 (rows beyond the backbone's
    positions); N140 (no window of n in a row).
    """
    at = str(path)
    values, meta = read_tensors(path)
    ids, said = values.get("ids"), meta.get("prompt", "")
    if ids is None or not said.isascii() or not said.isdigit() or len(said) > 9:
        raise PccError("N142", "not a file of greedy continuations", at=at)
    if ids.ndim != 2 or not ids.numel() or ids.dtype not in _INTEGERS:
        what = f"greedy rows are {ids.dtype} of shape {tuple(ids.shape)}, expected integers [R,T]"
        raise PccError("N142", what, at=at)
    low, high = int(ids.min()), int(ids.max())
    vocab, room = model.config["vocab_size"], model.config["max_position_embeddings"]
    if low < 0 or high >= vocab:
        raise PccError("N142", f"ids from {low} to {high} for {vocab} tokens", at=at)
    length, prompt = ids.shape[1], int(said)
    if length > room:
        raise PccError("N120", f"rows of {length} ids, the backbone has {room} positions", at=at)
    if not 1 <= prompt < length:
        raise PccError("N142", f"rows of {length} ids, the first {prompt} of them given", at=at)
    if length - prompt < n:
        what = f"{length - prompt} greedy ids a row leave no window of {n}"
        raise PccError("N140", what, at=at, hint="make it with a larger greedy.length")
    if (made := meta.get(BACKBONE)) and made != sha256(backbone / SINGLE):
        hint = "make it again with this backbone (kind: greedy)"
        raise PccError("N142", "this greedy text is of another backbone", at=at, hint=hint)
    return ids.numpy(), prompt


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def read_multi_byte(folder: Path, model: Backbone) -> Tensor:
    """Return unembeddings (m,V,D) of tokens 1..m: the multi-byte heads', or the verifier's own.

    Errors: N122 (heads of another shape), N132.
    """
    path, own = folder / "multi_byte" / "heads.safetensors", model.lm_head.weight
    if not path.is_file():
        return own[None]
    heads = read_tensors(path)[0].get("heads")
    if heads is None:
        raise PccError("N122", "there is no tensor 'heads'", at=str(path))
    if heads.ndim != 3 or not len(heads) or heads.shape[1:] != own.shape:
        what = f"heads have shape {tuple(heads.shape)}, expected (m, {own.shape[0]}, "
        raise PccError("N122", what + f"{own.shape[1]}), m > 0", at=str(path))
    if not heads.is_floating_point() or not torch.isfinite(heads).all():
        raise PccError("N122", "heads are not all finite floating-point numbers", at=str(path))
    return heads


def same_circuit(
    described: Mapping[str, Any], values: Mapping[str, Tensor], head: CircuitHead, at: str
) -> None:
    """Refuse an `init` head of another circuit, whatever its shapes. Errors: N112, T102.

    Kind, region graph and the tokens of the leaves must be the same: with others, equal shapes
    hold other parameters.
    """
    hint = "give head.kind, head.regions, head.repetitions and head.shuffle as they were there"
    theirs, mine = lookup(described, "circuit.name"), NAMES[head.kind]
    if theirs != mine:
        what = f"the circuit there is '{str(theirs)[:40]}', here '{mine}'"
        raise PccError("N112", what, at=at, hint=hint)
    regions = lookup(described, "circuit.model.regions")
    if head.kind in ("tree", "region-graph") and parse_regions(regions, head.n, at) != (
        parse_regions(head.sizes.regions, head.n, "head.regions")
    ):
        raise PccError("N112", "the region graph there is another one", at=at, hint=hint)
    scope = values.get(SCOPE)
    if scope is not None and scope.flatten().tolist() != head.scope:
        raise PccError("N112", "leaves there are over other tokens", at=at, hint=hint)
