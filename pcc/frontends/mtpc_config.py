"""The configuration of a published MTPC checkpoint: kind, sizes, and heads that are not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pcc.errors import PccError
from pcc.frontends.state import lookup
from pcc.knobs import MAX_WINDOW

KINDS = {
    "ff": "ff", "fully_factorized": "ff", "fully_factorised": "ff", "cp": "cp", "hmm": "hmm",
    "btree": "btree", "random_btree": "btree", "region_graph": "region-graph",
}  # fmt: skip


def kind_of(kind: Any, n: Any, at: str) -> str:
    """Return ff, cp, hmm, btree or region-graph. Errors: F110 (unknown kind, n < 2 or absurd)."""
    plain = KINDS.get(kind.strip().lower().replace("-", "_")) if isinstance(kind, str) else None
    if plain is None:
        hint = "known kinds: fully-factorized, cp, hmm, btree, random-btree, region-graph"
        raise PccError("F110", f"unknown circuit kind {kind!r}", at=at, hint=hint)
    if type(n) is not int or not 2 <= n <= MAX_WINDOW:
        hint = f"the window must hold 2 to {MAX_WINDOW} tokens"
        raise PccError("F110", f"n_token is {n!r}", at=at, hint=hint)
    return plain


def _first(config: Mapping[str, Any], at: str, *keys: str) -> Any:
    return next((v for key in keys if (v := lookup(config, key, at=at)) is not None), None)


def sizes_of(config: Mapping[str, Any], at: str) -> tuple[str, dict[str, int]]:
    """Read kind, n, r, V, s (and D where given) from the configuration. Errors: F103, F110."""
    keys = {
        "n": ("circuit.n_token", "circuit.model.n_token"),
        "r": ("circuit.n_component", "circuit.model.n_component"),
        "repetitions": ("circuit.n_repetition", "circuit.model.n_repetition"),
        "vocab": ("data.vocab_size", "circuit.model.vocab_size"),
        "width": ("mt_head.hyperparameters.n_embd", "lm.n_embd"),
    }
    sizes: dict[str, int] = {}
    for name, places in keys.items():
        value = _first(config, at, *places)
        if value is None and name in ("repetitions", "width"):
            continue
        if type(value) is not int or value < 1:
            what = f"{places[0]} is {value!r}, not a positive whole number"
            raise PccError("F110", what, at=at, hint=f"set {places[0]} in config.yaml")
        sizes[name] = value
    kind = _first(config, at, "circuit.model.kind", "circuit.name")
    return kind_of(kind, sizes["n"], at), sizes


def refuse_variants(config: Mapping[str, Any], at: str) -> None:
    """Refuse head variants whose function differs from the linear head. Errors: F118."""
    base = "mt_head.hyperparameters."
    plain: dict[str, tuple[Any, ...]] = {
        "share_sum_weights": (None, False),
        "transformer_n_layer": (None, 0),
        "expander_type": (None, "linear", "low-rank"),
    }
    for key, allowed in plain.items():
        value = lookup(config, base + key, at=at)
        if value not in allowed:
            what = f"{base}{key} is {value!r}: this head is not supported"
            hint = f"only {key}: {str(allowed[1]).lower()} is, as in all released checkpoints"
            raise PccError("F118", what, at=at, hint=hint)
