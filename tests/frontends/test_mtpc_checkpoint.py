"""The MTPC checkpoint importer: wiring against the published numbers, and hostile input."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcc.errors import PccError
from pcc.frontends.mtpc_checkpoint import EMISSIONS, SCOPE, MtpcHead, from_arrays, load
from pcc.frontends.mtpc_wiring import decode, rebuild
from pcc.frontends.state import lookup

Array = np.ndarray[Any, Any]
SUM = "mt_head._sum_weights_heads.{}.head.proj"
FOLD = "circuit._circuit._address_book._in_fold_idx_{}_0"


def shared(name: str) -> Path:
    root = Path(os.environ.get("PCC_SHARED", Path(__file__).parents[3] / "shared")) / name
    if not root.exists():
        pytest.skip(f"shared folder missing: {name}")
    return root


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def joint(head: MtpcHead, e: Array, tokens: Array) -> Array:
    """Evaluate log q for e (S, D) and tokens (S, W, n), in float64, straight off the wiring."""
    e = e.astype(np.float64)
    emit = log_softmax(np.einsum("frvd,sd->sfrv", head.emissions.astype(np.float64), e))
    rows = np.arange(len(e))[:, None]
    out = {(-1, f): emit[rows, f, :, tokens[:, :, v]] for f, v in enumerate(head.scope)}
    for k, layer in enumerate(head.wiring.sums):
        proj = head.sums[k].astype(np.float64)
        logits = np.einsum("foid,sd->sfoi", proj, e) if proj.ndim == 4 else proj[None]
        weights = np.exp(log_softmax(logits + head.biases.get(k, 0.0)))
        for f, unit in enumerate(layer):
            parts = [out[p] for p in unit.inputs]
            x = np.concatenate(parts, -1) if unit.mix else np.sum(parts, axis=0)
            top = x.max(-1, keepdims=True)
            w = np.broadcast_to(weights[:, f], (len(e), *weights.shape[2:]))
            out[k, f] = np.log(np.einsum("soi,swi->swo", w, np.exp(x - top))) + top
    return np.asarray(np.sum([out[p] for p in head.wiring.root], axis=0)[..., 0])


def oracle(path: Path) -> tuple[dict[str, Array], dict[str, Any], Any]:
    data = np.load(path)
    keys = [k for k in data.files if k.startswith("mt_head.") and "@" not in k]
    arrays = {k: data[k].astype(np.float32) * data[f"{k}@scale"] for k in keys}
    return arrays, json.loads(str(data["meta_json"])), data


def test_joint_of_every_oracle_head() -> None:
    for path in sorted(shared("oracle/head").glob("*.npz")):
        arrays, meta, data = oracle(path)
        head = from_arrays(arrays, meta["kind"], meta["n"], data["scope_idx"], r=meta["r"])
        got = joint(head, data["e"], data["tokens"])
        np.testing.assert_allclose(
            got, data["joint_logp_f64"], rtol=0, atol=1e-9, err_msg=path.stem
        )


def test_joint_of_every_tiny_circuit() -> None:
    data = np.load(shared("oracle/sampling_tiny.npz"))
    for name in sorted({k.split("/")[0] for k in data.files}):
        keys = [k for k in data.files if k.startswith(f"{name}/mt_head.") and "@" not in k]
        arrays = {k.split("/")[1]: data[k] * np.float32(data[f"{k}@scale"]) for k in keys}
        want = data[f"{name}/joint_logp_f64"]
        head = from_arrays(arrays, name.split("-")[0], want.ndim, data[f"{name}/scope_idx"])
        tokens = np.array(list(np.ndindex(want.shape)))[None]
        got = joint(head, data[f"{name}/e"], tokens)
        np.testing.assert_allclose(got[0], want.reshape(-1), rtol=0, atol=1e-9, err_msg=name)


def test_checkpoint_folders() -> None:
    pytest.importorskip("torch")
    for path in sorted(shared("oracle/checkpoints").glob("*/expected_first_round.npz")):
        head, data = load(path.parent), np.load(path)
        tokens = data["first_draft_argmax"][None, None, :]
        got = joint(head, data["draft_hidden_f32"][-1:], tokens)
        np.testing.assert_allclose(got.reshape(-1), data["first_draft_joint_logp_f32"], atol=5e-5)
        shapes = [x.shape[:3] for x in head.sums]
        again = rebuild(head.kind, head.n, head.repetitions, head.scope, shapes, "")
        assert (again, head.step) == (head.wiring, 900)
        assert head.source.endswith("model@900.pt")
        assert len(head.fingerprint) == 64


# --- made here ---------------------------------------------------------------------------------

CONFIG = """
circuit: {{name: {kind}, n_token: {n}, n_component: {r}, n_repetition: {s}}}
data: {{vocab_size: 5}}
lm: {{n_embd: 3}}
mt_head: {{hyperparameters: {{n_embd: "${{lm.n_embd}}", transformer_n_layer: 0}}}}
"""


def weights(kind: str, n: int, r: int = 2, s: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(n * 100 + s)
    shapes = {"ff": [], "cp": [(1, 1, r)], "hmm": [(1, r, r)] * (n - 1) + [(1, 1, r)]}.get(kind)
    if shapes is None:
        levels = {2: [], 3: [1], 4: [2], 5: [2, 1], 6: [2, 2], 8: [4, 2]}[n]
        shapes = [(f * s, r, r) for f in levels] + [(s, 1, r)] + [(1, 1, s)] * (s > 1)
    state = {SUM.format(k): rng.normal(size=(*x, 3)) for k, x in enumerate(shapes)}
    state[EMISSIONS] = rng.normal(size=(n * s, r, 5, 3))
    return {k: v.astype(np.float32) for k, v in state.items()}


def write(folder: Path, state: dict[str, Array], step: int = 900, **config: Any) -> Path:
    """Write config.yaml and a safetensors file (uint16 arrays are stored as bf16)."""
    names = {"float32": "F32", "uint16": "BF16", "int64": "I64", "bool": "BOOL"}
    header, data = {}, b""
    for key, value in state.items():
        span = [len(data), len(data) + value.nbytes]
        shape, dtype = list(value.shape), names[str(value.dtype)]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        data += np.ascontiguousarray(value).tobytes()
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    path = folder / f"model@{step}.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    sizes = {"kind": "cp", "n": 4, "r": 2, "s": 1} | config
    (folder / "config.yaml").write_text(CONFIG.format(**sizes))
    return path


def cp_state() -> dict[str, Array]:
    return weights("cp", 4) | {SCOPE: np.arange(4)[:, None], FOLD.format(3): np.array([0])}


def refused(code: str, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(PccError) as caught:
        load(*args, **kwargs)
    assert caught.value.code == code, caught.value
    assert len(str(caught.value).splitlines()) <= 2
    assert caught.value.at
    return str(caught.value)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("s", [1, 2])
def test_rebuilt_trees_are_normalised(n: int, s: int) -> None:
    order = {3: [2, 0, 1], 5: [0, 1, 4, 2, 3], 6: [2, 5, 0, 1, 3, 4]}.get(n, list(range(n)))
    head = from_arrays(weights("btree", n, s=s), "btree", n, order * s)
    assert head.repetitions == s
    tokens = np.zeros((1, 4, n), int)
    tokens[0, :, 0] = range(4)
    assert np.isfinite(joint(head, np.ones((1, 3)), tokens)).all()
    if n <= 4:
        whole = np.array(list(np.ndindex((5,) * n)))[None]
        total = np.exp(joint(head, np.ones((1, 3)), whole)).sum()
        assert total == pytest.approx(1, abs=1e-12)


def test_wiring_is_read_not_assumed() -> None:
    state = weights("btree", 4)
    index = {1: np.array([[0, 3], [1, 2]]), 5: np.array([0])}
    stored = {FOLD.format(k): v for k, v in index.items()}
    head = from_arrays(state | stored, "btree", 4, [3, 1, 2, 0])
    assert head.wiring.sums[0][0].inputs == ((-1, 0), (-1, 3))
    assert head.wiring != from_arrays(state, "btree", 4, [3, 1, 2, 0]).wiring


@pytest.mark.parametrize("bad", [[[0, 0], [2, 3]], [[0, 1], [2, 9]], [[0, 1]], [[0, -1], [2, 3]]])
def test_wiring_that_is_no_tree(bad: list[list[int]]) -> None:
    stored = {FOLD.format(1): np.array(bad), FOLD.format(5): np.array([0])}
    with pytest.raises(PccError) as caught:
        from_arrays(weights("btree", 4) | stored, "btree", 4, range(4))
    assert caught.value.code == "F115"


def test_repetitions_from_buffers() -> None:
    index = {1: np.array([[0, 1], [2, 3]]), 4: np.array([0])}
    wiring = decode("btree", 2, [0, 1, 0, 1], [(2, 1, 4), (1, 1, 2)], index, "")
    assert wiring == rebuild("btree", 2, 2, [0, 1, 0, 1], [(2, 1, 4), (1, 1, 2)], "")
    assert wiring.sums[1][0].mix


def test_scope_that_fits_no_published_tree() -> None:
    with pytest.raises(PccError) as caught:
        from_arrays(weights("btree", 4, s=2), "btree", 4, [0, 0, 1, 1, 2, 2, 3, 3])
    assert caught.value.code == "F114"


def test_newest_step_prefixes_and_bf16(tmp_path: Path) -> None:
    state = cp_state()
    half = {k: (v.view(np.uint32) >> 16).astype(np.uint16) for k, v in weights("cp", 4).items()}
    write(tmp_path, state, 900)
    write(tmp_path, {f"_orig_mod.module.{k}": v for k, v in (state | half).items()}, 1000)
    head, old = load(tmp_path), load(tmp_path, step=900)
    assert (head.step, old.step) == (1000, 900)
    want = old.emissions.view(np.uint32) & np.uint32(0xFFFF0000)
    np.testing.assert_array_equal(head.emissions.view(np.uint32), want)
    assert head.fingerprint != old.fingerprint
    refused("F101", tmp_path, step=7)


def test_cp_of_rank_one_without_sums_is_fully_factorised(tmp_path: Path) -> None:
    state = weights("ff", 4, r=1) | {SCOPE: np.arange(4)[:, None], FOLD.format(2): np.array([0])}
    write(tmp_path, state, r=1)
    head = load(tmp_path)
    assert (head.kind, head.wiring.sums, len(head.wiring.root)) == ("ff", (), 4)


def test_unknown_tensor_is_named_and_can_be_mapped(tmp_path: Path) -> None:
    state = weights("hmm", 3) | {SCOPE: np.arange(3)[::-1].copy()[:, None]}
    key = "mt_head._sum_weights_heads.0.head.identity"
    write(tmp_path, state | {key: np.eye(2, dtype=np.float32) * 9}, kind="hmm", n=3)
    text = refused("F111", tmp_path)
    assert key in text
    assert "(2, 2)" in text
    head = load(tmp_path, hmm_bias=[key])
    assert head.biases[0].shape == (1, 2, 2)
    both = load(tmp_path, hmm_bias={key: (0, 1)})
    assert sorted(both.biases) == [0, 1]
    refused("F117", tmp_path, hmm_bias={key: 2})
    refused("F117", tmp_path, hmm_bias=["mt_head.absent"])
    refused("F117", tmp_path, hmm_bias={"mt_head.absent": 0})


def test_trained_logits_without_context() -> None:
    state = weights("hmm", 2)
    state[SUM.format(0)] = np.log(np.array([[[0.25, 0.75], [0.5, 0.5]]], np.float32))
    head = from_arrays(state, "hmm", 2, [1, 0])
    whole = np.array(list(np.ndindex(5, 5)))[None]
    assert np.exp(joint(head, np.ones((1, 3)), whole)).sum() == pytest.approx(1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", [EMISSIONS, SUM.format(0)])
def test_values_that_are_not_finite(tmp_path: Path, value: float, key: str) -> None:
    state = cp_state()
    state[key].reshape(-1)[-1] = value
    write(tmp_path, state)
    assert key in refused("F112", tmp_path)


@pytest.mark.parametrize(
    ("code", "key", "value"),
    [
        ("F113", EMISSIONS, np.ones((4, 2, 6, 3), np.float32)),
        ("F113", EMISSIONS, np.ones((5, 2, 5, 3), np.float32)),
        ("F113", EMISSIONS, np.ones((4, 2, 5), np.float32)),
        ("F113", SUM.format(0), np.ones((1, 1, 3, 3), np.float32)),
        ("F113", SUM.format(0), np.ones((1, 1, 2, 4), np.float32)),
        ("F113", SUM.format(1), np.ones((1, 1, 2, 3), np.float32)),
        ("F111", SUM.format(2), np.ones((1, 1, 2, 3), np.float32)),
        ("F112", EMISSIONS, np.ones((4, 2, 5, 3), np.int64)),
        ("F116", SCOPE, np.array([[0], [1], [2], [2]])),
        ("F115", FOLD.format(3), np.array([1])),
        ("F111", "circuit._circuit._nodes.3.scale", np.ones(2, np.float32)),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, code: str, key: str, value: Array) -> None:
    write(tmp_path, cp_state() | {key: value})
    refused(code, tmp_path)


@pytest.mark.parametrize("key", [EMISSIONS, SCOPE])
def test_missing_tensor(tmp_path: Path, key: str) -> None:
    write(tmp_path, {k: v for k, v in cp_state().items() if k != key})
    refused("F116" if key == SCOPE else "F111", tmp_path)


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        ("F110", "name: cp", "name: pyramid"),
        ("F110", "n_token: 4", "n_token: 1"),
        ("F110", "n_token: 4", "n_token: [4]"),
        ("F110", "n_component: 2", "n_component: true"),
        ("F103", "n_token: 4", "n_token: '${circuit.n_token}'"),
        ("F103", "n_token: 4", "n_token: '${oc.env:HOME}/x'"),
        ("F103", "n_token: 4", "n_token: '${nowhere.n}'"),
        ("F118", "transformer_n_layer: 0", "transformer_n_layer: 2"),
        ("F118", "transformer_n_layer: 0", "expander_type: mlp"),
        ("F118", "transformer_n_layer: 0", "share_sum_weights: true"),
        ("F102", "circuit:", "circuit: ]"),
        ("F102", "circuit:", "circuit: !!python/object/apply:os.getcwd []\nx:"),
    ],
)
def test_configuration(tmp_path: Path, code: str, old: str, new: str) -> None:
    write(tmp_path, cp_state())
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace(old, new))
    refused(code, tmp_path)


def test_reference_through_a_mapping() -> None:
    config = {"a": "${b.c}", "b": {"c": {"d": "${e}"}}, "e": 3, "f": "${g}", "g": "${f}"}
    assert lookup(config, "a.d") == 3
    with pytest.raises(PccError, match="cyclic reference f -> g -> f"):
        lookup(config, "f")


def test_missing_files(tmp_path: Path) -> None:
    refused("F101", tmp_path / "absent")
    assert "config.yaml is missing" in refused("F102", tmp_path)
    write(tmp_path, cp_state()).unlink()
    refused("F101", tmp_path)
    (tmp_path / "config.yaml").write_text("a: " + "x" * (1 << 20))
    refused("F102", tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_safetensors(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, cp_state())
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refused("F104", tmp_path)


def test_truncated_and_wrong_pt(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write(tmp_path, {}).unlink()
    path = tmp_path / "model@1.pt"
    state = {k: torch.from_numpy(v.copy()) for k, v in cp_state().items()} | {"lm.x": None}
    torch.save({"model_state_dict": state, "optimizer_state_dict": None}, path)
    assert load(tmp_path).kind == "cp"
    path.write_bytes(path.read_bytes()[:-200])
    refused("F104", tmp_path)
    path.write_bytes(b"not a checkpoint at all")
    refused("F104", tmp_path)
    torch.save([1, 2], path)
    refused("F106", tmp_path)
    torch.save({"model_state_dict": {EMISSIONS: "text"}}, path)
    refused("F106", tmp_path)
    torch.save({EMISSIONS: torch.zeros(1).expand(10**6, 10**6)}, path)
    refused("F106", tmp_path)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_not_executed(tmp_path: Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch")
    write(tmp_path, {}).unlink()
    path, target = tmp_path / "model@1.pt", tmp_path / "executed"
    if zipped:
        torch.save({"model_state_dict": {EMISSIONS: Payload(target)}}, path)
    else:
        path.write_bytes(pickle.dumps({"model_state_dict": Payload(target)}, protocol=2))
    refused("F105", tmp_path)
    assert not target.exists()
