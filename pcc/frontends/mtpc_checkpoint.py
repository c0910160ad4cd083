"""Import a published MTPC checkpoint: head tensors and circuit wiring as one validated value.

The head is linear in the context vector e (D): leaf i, unit z has logits ``W[i,z] e`` over V tokens
(log_softmax over V); sum layer k has logits ``P_k e + bias_k`` of shape (F, Ko, Ki) (softmax over
Ki). Which leaf is which token, and which folds feed which sum, is read from the checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pcc.errors import PccError
from pcc.frontends import mtpc_experts as experts
from pcc.frontends.mtpc_config import kind_of, refuse_variants, sizes_of
from pcc.frontends.mtpc_experts import Experts, Trunk
from pcc.frontends.mtpc_wiring import LEAVES, SumFold, Wiring, decode, expect_shapes, rebuild
from pcc.frontends.region_wiring import parse_regions, region_shapes, region_wiring
from pcc.frontends.regions import RegionGraph
from pcc.frontends.scaled import Scaled, scaled
from pcc.frontends.state import lookup, read_state, step_of, strip_prefixes
from pcc.frontends.unread import Unread, floats, parts

__all__ = ["LEAVES", "MtpcHead", "SumFold", "Wiring", "from_arrays", "load", "read_state"]

Array = np.ndarray[Any, Any]
Bias = Mapping[str, int | Sequence[int]] | Sequence[str]

EMISSIONS = "mt_head._categorical_log_probs_heads.0.head.proj"
SCOPE = "circuit._circuit._nodes.0._scope_idx"
_BIAS = re.compile(r"mt_head\._sum_weights_heads\.\d{1,6}\.head\.bias")
_SUM = re.compile(r"mt_head\._sum_weights_heads\.(\d{1,6})\.head\.proj")
_FOLD = re.compile(r"circuit\._circuit\._address_book\._in_fold_idx_(\d{1,6})_0")
_MASKS = re.compile(r"circuit\._(autoregressive|univariate)_mar_mask")
_APART = re.compile(r"lm\..*|_exp_gamma_weights")  # the verifier, and weights of the training loss


@dataclass(frozen=True)
class MtpcHead:
    """An MTPC head with the wiring of its circuit.

    emissions: (Fleaf, r, V, D) float32, leaf fold i models token ``scope[i]``, Fleaf = n * s.
    experts: low-rank experts; the emissions are then (Fleaf, 1, V, D), which all of them share.
    trunk: residual layer between the hidden state and every projection, None: none.
    sums[k]: (F, Ko, Ki, D) float32 contextual, or (F, Ko, Ki) trained logits; Ko = 1 at the root.
    wiring.sums[k][f]: the inputs of fold f of sum layer k; wiring.root: factors of the output.
    biases[k]: (F, Ko, Ki) float32, added to the logits of sum layer k before the softmax over Ki.
    """

    kind: str
    n: int
    r: int
    vocab: int
    width: int
    repetitions: int
    emissions: Array = field(repr=False)
    sums: tuple[Array, ...] = field(repr=False)
    scope: tuple[int, ...]
    wiring: Wiring = field(repr=False)
    biases: Mapping[int, Array] = field(default_factory=dict, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    step: int = -1
    source: str = ""
    fingerprint: str = ""
    experts: Experts | None = None
    trunk: Trunk | None = None


def load(folder: str | Path, *, step: int | None = None, hmm_bias: Bias | None = None) -> MtpcHead:
    """Read a checkpoint folder (``config.yaml`` + ``model@<step>.pt`` or ``.safetensors``).

    ``hmm_bias`` maps a tensor name to the sum layer (or layers) whose logits it is added to; a
    list of names takes the layer from ``_sum_weights_heads.<k>.`` in each name.
    Errors: F1xx for bad input, X101 when a .pt file is met without torch.
    """
    bias = _bias_map(hmm_bias, str(folder))
    config, state, path = read_state(folder, step=step, keep=tuple(bias), unread=True)
    where = str(Path(folder) / "config.yaml")
    refuse_variants(config, where)
    kind, sizes = sizes_of(config, where)
    scope = _scope(state.get(SCOPE), f"{path}:{SCOPE}")
    for key in state:
        if not (key.startswith(("mt_head.", "circuit.")) or key in bias or _APART.fullmatch(key)):
            raise _unknown(key, "", str(path))
    graph = None
    if kind == "region-graph":
        text = lookup(config, "circuit.model.regions", at=where)
        graph = parse_regions(text, sizes["n"], f"{where}:circuit.model.regions")
    weights = {k: v for k, v in state.items() if v is not None}
    if lookup(config, "mt_head.hyperparameters.sum_bias", at=where):
        bias |= _bias_map([k for k in weights if _BIAS.fullmatch(k)], str(path))
    return from_arrays(
        weights,
        kind,
        sizes["n"],
        scope,
        r=sizes["r"],
        vocab=sizes["vocab"],
        width=sizes.get("width"),
        repetitions=sizes.get("repetitions"),
        hmm_bias=bias,
        config=config,
        step=step_of(path),
        source=str(path),
        regions=graph,
    )


def from_arrays(
    weights: Mapping[str, Array],
    kind: str,
    n: int,
    scope: Sequence[int],
    *,
    r: int | None = None,
    vocab: int | None = None,
    width: int | None = None,
    repetitions: int | None = None,
    hmm_bias: Bias | None = None,
    config: Mapping[str, Any] | None = None,
    step: int = -1,
    source: str = "arrays",
    regions: RegionGraph | None = None,
) -> MtpcHead:
    """Build a head from arrays under their checkpoint names; sizes not given are read off them.

    Shapes: emissions (n*s, r, V, D), sums (F, Ko, Ki, D) or (F, Ko, Ki), scope (n*s,); low-rank
    experts, a trunk and rows of integers as `pcc.frontends.mtpc_experts` says.
    Wiring: from ``_in_fold_idx`` entries where present, else rebuilt from the published rule; that
    of kind region-graph is `regions`.
    Rows of integers become float32 once the names and sizes that they belong to are known.
    Errors: F110 kind or n, F111 tensors, F112 values, F113 shapes, F114-F116 wiring, F117 bias.
    """
    kind, bias = kind_of(kind, n, source), _bias_map(hmm_bias, source)
    stripped = {strip_prefixes(key): _held(key, value) for key, value in weights.items()}
    named = scaled(stripped, source)
    numbers = _classify(named, bias, source)
    given = (None if repetitions is None else n * repetitions, r, vocab, width)
    emissions, low_rank, trunk = _emissions(named, n, given, source)
    many = emissions.shape[1] if low_rank is None else low_rank.factor.shape[1]
    if kind == "cp" and many == 1 and not numbers:
        kind = "ff"  # how the published configuration asks for it
    s, dim = len(emissions) // n, emissions.shape[3]
    projections = [_sum(named, k, dim, source) for k in range(len(numbers))]
    sizes = (kind, n, many, emissions.shape[2], dim, s)
    shapes = [x.shape[:3] for _, x in projections]
    if (kind == "region-graph") != (regions is not None):
        raise PccError("F114", f"a head of kind {kind} and a region graph", at=source,
                       hint="kind region-graph needs `regions`, others have none")  # fmt: skip
    places, wiring = _wire(named, sizes, shapes, scope, source, regions)
    sums = tuple(floats(x, at) for at, x in projections)
    biases = _biases(named, bias, shapes, source)
    extra = [x for part in (low_rank, trunk) if part for x in vars(part).values()]
    mark = _fingerprint(
        (*sizes, places, wiring), [emissions, *sums, *biases.values(), *extra], biases
    )
    origin = (config or {}, step, source, mark)
    return MtpcHead(*sizes, emissions, sums, places, wiring, biases, *origin, low_rank, trunk)


def _emissions(
    named: Mapping[str, Any], n: int, given: tuple[int | None, ...], source: str
) -> tuple[Array, Experts | None, Trunk | None]:
    """Return tables (F, r, V, D), or (F, 1, V, D) with the experts around them, and the trunk."""
    low, (folds, r, vocab, width) = experts.BASE in named, given
    key = experts.BASE if low else EMISSIONS
    at, shape = f"{source}:{key}", named[key].shape
    if low:
        shape, given = (*shape[:1], 1, *shape[1:]), (folds, 1, vocab, width)
    _check_emissions(shape, n, given, at)
    tables = floats(named[key], at).reshape(shape) if low else floats(named[key], at)
    found = experts.read_experts(named, shape, r, source) if low else None
    return tables, found, experts.read_trunk(named, shape[3], source)


def _wire(
    named: Mapping[str, Array],
    sizes: tuple[str, int, int, int, int, int],
    shapes: Sequence[tuple[int, ...]],
    scope: Sequence[int],
    source: str,
    regions: RegionGraph | None,
) -> tuple[tuple[int, ...], Wiring]:
    """Check scope and sum shapes; decode the stored wiring, or rebuild it where none is stored."""
    kind, n, r, _, _, s = sizes
    places = _check_scope(scope, n, s, f"{source}:{SCOPE}")
    if regions is not None:
        want = region_shapes(regions, r)
        if places != tuple(range(n)) or list(shapes) != want:
            what = f"sum layers {_brief(shapes)} do not fit the region graph: {_brief(want)}"
            raise PccError("F113", what, at=source, hint="leaf i is token i, repetitions 1")
        return places, region_wiring(regions)
    expect_shapes(kind, n, r, s, shapes, source)
    index = _fold_index(named, source)
    if index:
        return places, decode(kind, n, places, shapes, index, source)
    return places, rebuild(kind, n, s, places, shapes, source)


def _brief(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes[:8])) + (", .." if len(shapes) > 8 else "")


def _bias_map(bias: Bias | None, at: str) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> sum layers. Errors: F117 (a name without a layer)."""
    if isinstance(bias, str):
        bias = [bias]
    if isinstance(bias, Mapping):
        return {
            strip_prefixes(key): (k,) if isinstance(k, int) else tuple(k) for key, k in bias.items()
        }
    result: dict[str, tuple[int, ...]] = {}
    for key in bias or ():
        match = re.search(r"_sum_weights_heads\.(\d{1,6})\.", key)
        if match is None:
            hint = "map it: hmm_bias={'NAME': layer}"
            raise PccError("F117", f"which sum layer does {key!r} belong to?", at=at, hint=hint)
        result[strip_prefixes(key)] = (int(match[1]),)
    return result


# --- tensors -----------------------------------------------------------------------------------


def _classify(named: Mapping[str, Any], bias: Mapping[str, Any], at: str) -> list[int]:
    """Return the sum-layer numbers 0..K-1; every head or circuit tensor must be understood.

    Errors: F111 (unknown or missing tensors), F113 (wiring with scales), F117 (bias name absent).
    """
    for key in bias:
        if key not in named:
            have = ", ".join(k for k in named if k.startswith("mt_head."))[:200]
            raise PccError("F117", f"no tensor {key}", at=at, hint=f"head tensors: {have}")
    tables = experts.BASE if experts.BASE in named else EMISSIONS
    known = (tables, SCOPE, *bias, *experts.TRUNK)
    known += experts.PARTS if tables == experts.BASE else ()
    for key, value in named.items():
        if isinstance(value, Scaled) and key.startswith("circuit."):
            what = "rows of integers with scales, where whole numbers belong"
            raise PccError("F113", what, at=f"{at}:{key}", hint="store the tensor as it was")
        if key in known or any(p.fullmatch(key) for p in (_SUM, _FOLD, _MASKS, _APART)):
            continue
        raise _unknown(key, f" of shape {tuple(value.shape)}", at)
    numbers = sorted(int(m[1]) for key in named if (m := _SUM.fullmatch(key)))
    if tables not in named or numbers != list(range(len(numbers))):
        lacking = tables if tables not in named else f"a sum layer between {numbers}"
        hint = "only linear and low-rank heads are read"
        raise PccError("F111", f"missing {lacking}", at=at, hint=hint)
    return numbers


def _unknown(key: str, shape: str, at: str) -> PccError:
    hint = f"if it is a bias on sum logits, say so: hmm_bias={{'{key}': <sum layer>}}"
    return PccError("F111", f"unknown tensor {key}{shape}", at=f"{at}:{key}", hint=hint)


def _held(key: str, value: Any) -> Any:
    """Return a tensor in memory; projections may stay where they are."""
    key = strip_prefixes(key)
    stays = isinstance(value, Unread) and (key == EMISSIONS or _SUM.fullmatch(key))
    return value if stays else np.asarray(value)


def _check_emissions(shape: tuple[int, ...], n: int, want: tuple[int | None, ...], at: str) -> None:
    """Check (n*s, r, V, D) against the sizes that are given. Errors: F113."""
    fits = len(shape) == 4 and 0 not in shape and shape[0] % n == 0
    if not fits or any(w not in (None, have) for w, have in zip(want, shape, strict=True)):
        names = ("n*repetitions", "r", "V", "D")
        text = ", ".join(x if w is None else f"{x}={w}" for x, w in zip(names, want, strict=True))
        what = f"shape {shape}, expected ({text}) with n={n}"
        raise PccError("F113", what, at=at, hint="check config.yaml against the tensors")


def _sum(named: Mapping[str, Any], k: int, dim: int, source: str) -> tuple[str, Any]:
    """Return the place of projection k, and (F, Ko, Ki, D) or trained logits (F, Ko, Ki): F113."""
    key = f"mt_head._sum_weights_heads.{k}.head.proj"
    value = named[key] if key in named else np.zeros(0)
    if value.ndim not in (3, 4) or value.shape[3:] not in ((), (dim,)):
        what = f"shape {value.shape}, expected (F, Ko, Ki, {dim}), or (F, Ko, Ki) if not contextual"
        raise PccError("F113", what, at=f"{source}:{key}")
    return f"{source}:{key}", value


def _scope(value: Array | None, at: str) -> list[int]:
    """Return the stored scope index (n*s, 1) as a list. Errors: F116."""
    if value is None or value.dtype.kind not in "iu" or value.ndim not in (1, 2):
        what = "the scope index is missing" if value is None else "the scope index is malformed"
        hint = "it says which token each leaf models; it is never assumed"
        raise PccError("F116", what, at=at, hint=hint)
    return [int(v) for v in value.reshape(-1)]


def _check_scope(scope: Sequence[int], n: int, s: int, at: str) -> tuple[int, ...]:
    """Check that every token has exactly s leaves. Errors: F116."""
    places = tuple(int(v) for v in np.asarray(scope).reshape(-1))
    if sorted(places) != sorted(list(range(n)) * s):
        what = f"{list(places)[:40]} does not name each of {n} tokens {s} time(s)"
        raise PccError("F116", what, at=at)
    return places


def _fold_index(named: Mapping[str, Array], source: str) -> dict[int, Array]:
    """Collect the stored fold indices by layer. Errors: F115 (not whole numbers)."""
    index = {}
    for key, value in named.items():
        match = _FOLD.fullmatch(key)
        if match is None:
            continue
        if value.dtype.kind not in "iu":
            raise PccError("F115", f"holds {value.dtype}, not whole numbers", at=f"{source}:{key}")
        index[int(match[1])] = value
    return index


def _biases(
    named: Mapping[str, Any],
    bias: Mapping[str, Sequence[int]],
    shapes: Sequence[tuple[int, ...]],
    source: str,
) -> dict[int, Array]:
    """Broadcast each bias to the (F, Ko, Ki) of its layers and add up. Errors: F112, F117."""
    result: dict[int, Array] = {}
    for key, layers in bias.items():
        at, value = f"{source}:{key}", named[key]
        for k in layers:
            if type(k) is not int or not 0 <= k < len(shapes):
                what = f"sum layer {k!r} does not exist (0 to {len(shapes) - 1})"
                raise PccError("F117", what, at=at)
            if not _broadcasts(value.shape, shapes[k]):
                what = f"shape {value.shape} does not broadcast to {shapes[k]} of sum layer {k}"
                raise PccError("F117", what, at=at)
            whole = np.broadcast_to(floats(value, at), shapes[k])
            result[k] = np.array(whole) if k not in result else result[k] + whole
    return result


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in ends)


def _fingerprint(head: tuple[Any, ...], arrays: Sequence[Array], biases: Mapping[int, Any]) -> str:
    """Return the SHA-256 of sizes, scope, wiring and weights (float32, little endian)."""
    digest = hashlib.sha256(repr((head, tuple(biases))).encode())
    for array in arrays:
        digest.update(repr(array.shape).encode())
        for part in parts(array):
            digest.update(part)
    return digest.hexdigest()
