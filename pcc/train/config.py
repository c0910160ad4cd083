"""Configurations: YAML to frozen dataclasses; an unknown key or a wrong type is an error."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml  # type: ignore[import-untyped, unused-ignore]

from pcc.errors import PccError
from pcc.frontends.state import read_config
from pcc.knobs import MAX_WINDOW

REGIONAL = ("tree", "region-graph")  # kinds of heads that have `regions`
T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Training bytes: a packed file, or files and folders (`suffix` picks the files in folders)."""

    packed: str = ""
    paths: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    suffix: str = ".py"
    length: int = 512  # T, positions of a training row


@dataclass(frozen=True)
class Model:
    """Sizes of a backbone trained from scratch; vocabulary = 256 bytes, BOS 256, EOS 257."""

    width: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    hidden: int = 512
    max_length: int = 1024
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class MultiByte:
    """Auxiliary loss of a backbone: weight * sum_{j=2..n} gamma^(j-1) CE(x_{t+j} | e_t)."""

    n: int = 0
    weight: float = 0.3
    gamma: float = 0.9
    fraction: float = 0.25  # of the positions, drawn anew each step


@dataclass(frozen=True)
class Head:
    """The head: circuit kind and sizes, and how logits depend on the hidden state."""

    kind: str = "cp"  # ff, cp, hmm, btree, tree or region-graph
    n: int = 8
    r: int = 8
    regions: str = ""  # of kinds tree and region-graph: see pcc.frontends.region_wiring
    repetitions: int = 1
    shuffle: bool = False
    emissions: Literal["linear", "low-rank"] = "linear"
    rank: int = 16  # k, of low-rank emissions
    trunk: int = 0  # H, hidden units of the MLP before the projections; 0: none
    sum_bias: bool = True
    noise: float = 0.1  # spread of the experts around the verifier's unembedding at the start
    identity: float = 4.0  # HMM: logit of staying in a state at the start


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the last `layers` layers; 0 layers: the backbone is shared whole."""

    layers: int = 0
    r: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """sum_i w_i (-log q(x_i | x_<i) + distill KL(p_i || q_i)), w_1 = first, w_i = gamma^(i-1)."""

    gamma: float = 0.9
    first: float = 1.0  # 0: train what is conditioned on the carry only
    distill: float = 0.0
    greedy: str = ""  # file of the verifier's own greedy continuations (`kind: greedy`)
    greedy_fraction: float = 0.5
    positions: int = 0  # of a batch that the circuit is evaluated at; 0: all


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations of the verifier: rows of `prompt` given and `length` new bytes."""

    rows: int = 4096
    batch: int = 1024
    prompt: int = 128
    length: int = 384


@dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and a cosine to `floor` of the rate."""

    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 100
    floor: float = 0.0
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Run:
    """Where and how: device, precision, files and intervals (in steps; 0: never)."""

    device: str = "auto"
    bf16: bool = False
    compile: bool = False
    save_every: int = 500
    keep: int = 2
    log_every: int = 20
    check_every: int = 1  # how often the loss is looked at; a NaN is named by its step either way
    eval_every: int = 0
    eval_prompts: int = 64
    eval_prompt: int = 256  # bytes of context
    eval_bytes: int = 128  # greedy bytes per prompt
    storage: Literal["f32", "f16", "bf16"] = "f16"


@dataclass(frozen=True)
class Config:
    """One training run. `kind` says what is made: a backbone, greedy continuations, or a head."""

    kind: Literal["backbone", "greedy", "head"]
    out: str
    name: str = ""
    seed: int = 0
    backbone: str = ""  # folder of the verifier, for kinds greedy and head
    init: str = ""  # head folder to continue from (weights only)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    multi_byte: MultiByte = field(default_factory=MultiByte)
    head: Head = field(default_factory=Head)
    lora: Lora = field(default_factory=Lora)
    loss: Loss = field(default_factory=Loss)
    greedy: Greedy = field(default_factory=Greedy)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


# The interval of each number; every number of a configuration has one.
RANGES = {
    "seed": "[0, 2147483647]",
    "data.length": "[2, inf)",
    **{f"model.{k}": "[1, inf)" for k in ("width", "layers", "heads", "kv_heads", "hidden")},
    "model.max_length": "[1, inf)",
    "model.rope_theta": "(0, inf)",
    "multi_byte.n": "[0, inf)",
    "multi_byte.weight": "[0, inf)",
    "multi_byte.gamma": "(0, inf)",
    "multi_byte.fraction": "(0, 1]",
    "head.n": f"[2, {MAX_WINDOW}]",  # a window of 1 drafts nothing beyond the carry
    **{f"head.{k}": "[1, inf)" for k in ("r", "repetitions", "rank")},
    "head.trunk": "[0, inf)",
    "head.noise": "[0, inf)",
    "head.identity": "(-inf, inf)",
    "lora.layers": "[0, inf)",
    "lora.r": "[1, inf)",
    "lora.alpha": "(0, inf)",
    "loss.gamma": "(0, inf)",
    "loss.first": "[0, inf)",
    "loss.distill": "[0, inf)",
    "loss.greedy_fraction": "[0, 1]",
    "loss.positions": "[0, inf)",
    "greedy.rows": "[1, inf)",
    "greedy.batch": "[1, inf)",
    "greedy.prompt": "[2, inf)",
    "greedy.length": "[1, inf)",
    **{f"optim.{k}": "[1, inf)" for k in ("steps", "batch", "accumulate")},
    "optim.lr": "[0, inf)",
    "optim.warmup": "[0, inf)",
    "optim.floor": "[0, 1]",
    "optim.betas": "[0, 1)",
    "optim.weight_decay": "[0, inf)",
    "optim.clip": "[0, inf)",  # 0: never
    **{f"run.{k}_every": "[0, inf)" for k in ("save", "log", "check", "eval")},  # 0: never
    "run.keep": "[1, inf)",
    "run.eval_prompts": "[1, inf)",
    "run.eval_prompt": "[2, inf)",
    "run.eval_bytes": "[1, inf)",
}


def read(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration; `overrides` are `a.b=value`. Errors: F102, N101, N102."""
    if not path.exists():
        hint = "examples/train/*.yaml are some"
        raise PccError("F102", "there is no such configuration", at=str(path), hint=hint)
    raw = read_config(path)
    for text in overrides:
        _override(raw, text)
    return build(raw, str(path))


def build(raw: Mapping[str, Any], at: str = "config") -> Config:
    """Return the configuration of a plain mapping. Errors: N101 (keys, types), N102 (values)."""
    made = _build(Config, raw, at, "")
    assert isinstance(made, Config)
    for part in ("", *(f.name for f in dataclasses.fields(Config))):
        _check_ranges(getattr(made, part) if part else made, part, at)
    d, m = made.data, made.multi_byte
    if d.packed and (d.paths or d.heldout):
        hint = "leave out data.packed, or data.paths and data.heldout"
        raise PccError("N102", "data.packed holds all text", at=f"{at}:data", hint=hint)
    if made.kind == "backbone" and m.n >= d.length:
        what = f"multi_byte.n is {m.n}, not less than data.length, {d.length}"
        hint = "lower multi_byte.n, or raise data.length"
        raise PccError("N102", what, at=f"{at}:multi_byte.n", hint=hint)
    return made


def _check_ranges(part: Any, name: str, at: str) -> None:
    """Compare all numbers of one block with their ranges. Errors: N102."""
    if not dataclasses.is_dataclass(part):
        return
    for f in dataclasses.fields(part):
        key, value = f"{name}.{f.name}".strip("."), getattr(part, f.name)
        for x in value if isinstance(value, tuple) else (value,):
            if type(x) not in (int, float):
                continue
            if not _within(x, RANGES[key]):
                hint = f"choose a number in {RANGES[key]}"
                raise PccError("N102", f"{key} is {x}", at=f"{at}:{key}", hint=hint)


def _within(x: float, interval: str) -> bool:
    """Report whether x lies in an interval as written: [ and ] include, ( and ) exclude."""
    low, high = (float(v) for v in interval[1:-1].split(","))
    above = low <= x if interval[0] == "[" else low < x
    return above and (x <= high if interval[-1] == "]" else x < high)


def build_as(cls: type[T], raw: Any, at: str) -> T:
    """Return a plain mapping as a frozen dataclass, nested ones included. Errors: N101."""
    made = _build(cls, raw, at, "")
    assert isinstance(made, cls)
    return made


def plain(config: Config) -> dict[str, Any]:
    """Return the configuration as mappings and lists."""
    return _plain(dataclasses.asdict(config))  # type: ignore[no-any-return]


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    return [_plain(v) for v in x] if isinstance(x, list | tuple) else x


def _override(raw: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals:
        raise PccError("N101", f"'{text}' is not NAME=VALUE", at="--set")
    *outer, last = name.split(".")
    inner = raw
    for part in outer:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise PccError("N101", f"'{part}' in '{name}' holds no keys", at="--set")
    try:
        inner[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise PccError("N101", f"'{value}' is not a YAML value", at="--set") from None


def _build(cls: type, raw: Any, at: str, path: str) -> Any:
    """Make a dataclass from a mapping, nested ones included."""
    where = f"{at}:{path}" if path else at
    if not isinstance(raw, Mapping):
        raise PccError("N101", "is not a mapping of names to values", at=where)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    if bad := sorted(str(k) for k in raw if k not in known):
        raise PccError("N101", f"unknown key {bad[0]!r}", at=where, hint=f"known: {list(known)}")
    need = [k for k, f in known.items() if _required(f) and k not in raw]
    if need:
        raise PccError("N101", f"'{need[0]}' is missing", at=where)
    inner = {k: _value(hints[k], v, at, f"{path}.{k}".strip(".")) for k, v in raw.items()}
    return cls(**inner)


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, at: str, path: str) -> Any:
    """Return `value` as the annotated type."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, at, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    good, result = False, value
    if origin is Literal:
        good = value in args
    elif origin is tuple:
        item = args[0]
        sizes = None if args[-1] is Ellipsis else len(args)
        good = isinstance(value, list | tuple) and sizes in (None, len(value))
        result = tuple(_value(item, v, at, path) for v in value) if good else value
    elif hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as text.
        try:
            good = not isinstance(value, bool) and float(value) == float(value)
            result = float(value) if good else value
        except (TypeError, ValueError):
            good = False
    else:
        good = type(value) is hint
    if not good:
        want = f"one of {list(args)}" if origin is Literal else getattr(hint, "__name__", hint)
        what = f"{value!r} is not {want}"
        raise PccError("N101", what, at=f"{at}:{path}")
    return result
