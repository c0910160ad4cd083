"""Heads whose tensors are rows of integers: what is refused before a number is made, and memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcc.errors import PccError
from pcc.frontends import coded, scaled
from pcc.frontends.coded import encode
from pcc.frontends.mtpc_checkpoint import EMISSIONS, SCOPE, load
from pcc.frontends.mtpc_experts import BASE, TRUNK
from pcc.frontends.scaled import dequantise

Array = np.ndarray[Any, Any]
SUM = "mt_head._sum_weights_heads.0.head.proj"
N, R, V, D = 4, 2, 5, 24
CONFIG = f"""
circuit: {{name: cp, n_token: {N}, n_component: {R}, n_repetition: 1}}
data: {{vocab_size: {V}}}
lm: {{n_embd: {D}}}
mt_head: {{hyperparameters: {{transformer_n_layer: 0, sum_bias: true}}}}
"""
DTYPES = {"f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i1": "I8", "u1": "U8"}


def write(folder: Path, tensors: dict[str, Array], **spans: list[int]) -> Path:
    """Write a head; a tensor in `spans` is said to lie there."""
    header, data = {}, b""
    for key, value in tensors.items():
        span = spans.get(key, [len(data), len(data) + value.nbytes])
        dtype = DTYPES[value.dtype.str[1:]]
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": span}
        data += b"" if key in spans else value.tobytes()
    text = json.dumps(header).encode()
    (folder / "config.yaml").write_text(CONFIG)
    path = folder / "model@1.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def rows(name: str, *shape: int) -> dict[str, Array]:
    """Return random coded rows and their scales."""
    rng = np.random.default_rng(len(name))
    stored, fields = encode(rng.integers(-63, 64, shape).astype(np.int8))
    scale = rng.random(shape[:-1]).astype(np.float16)
    return {name: stored, name + ".streams": fields, name + ".scale": scale}


def zeros(name: str, rows: int) -> dict[str, Array]:
    """Return coded rows [rows,4096] of zeros, 8 times smaller than their integers."""
    stream = coded._deflate(bytes(1 << 16))
    count = rows * 4096 >> 16
    stored = np.frombuffer(stream * count, np.uint8)
    fields = np.array([4096, 1, 16] + [len(stream)] * count, np.int32)
    return {name: stored, name + ".streams": fields, name + ".scale": np.ones(rows, np.float16)}


def head() -> dict[str, Array]:
    """Return a head of coded rows."""
    scope = {SCOPE: np.arange(N)[:, None]}
    return rows(EMISSIONS, N, R, V, D) | rows(SUM, 1, 1, R, D) | scope


def code(folder: Path) -> str:
    """Return the code with which a head is refused."""
    with pytest.raises(PccError) as caught:
        load(folder)
    assert "Traceback" not in str(caught.value)
    assert caught.value.at
    return caught.value.code


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> None:
        raise AssertionError("numbers were made")

    monkeypatch.setattr(coded, "_inflate", made)
    monkeypatch.setattr(scaled, "restore", made)


def test_a_coded_head(tmp_path: Path) -> None:
    state = head()
    write(tmp_path, state)
    found = load(tmp_path)
    for key, got in ((EMISSIONS, found.emissions), (SUM, found.sums[0])):
        q = np.random.default_rng(len(key)).integers(-63, 64, got.shape)
        np.testing.assert_array_equal(got, np.float32(q) * state[key + ".scale"][..., None])


@pytest.mark.parametrize("shape", [(24, 40), (4, 6, 32)])
def test_coded_rows_are_read_as_the_integers(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    q, scale = rng.integers(-63, 64, shape).astype(np.int8), rng.random(shape[:-1], np.float32)
    stored, fields = encode(q)
    named = {"T": stored, "T.streams": fields, "T.scale": scale, "b": np.ones(3, np.float32)}
    found = dequantise(named, "here")
    want = dequantise({"T": q, "T.scale": scale}, "here")
    assert set(found) == {"T", "b"}
    np.testing.assert_array_equal(found["T"], want["T"])
    np.testing.assert_array_equal(found["T"], np.float32(q) * scale[..., None])
    with pytest.raises(PccError, match=r"here:T\.scale.*F113"):
        dequantise(named | {"T.scale": np.ones(shape[:-1], np.int64)}, "here")


WRONG: dict[str, tuple[dict[str, Array], str]] = {  # what is changed of a coded head
    "an unknown tensor": (rows("mt_head.x", 8, 8), "F111"),
    "a sum layer too far": (rows(SUM.replace("0", "2"), 1, 1, R, D), "F111"),
    "other tables": (rows(EMISSIONS, N, R, V + 1, D), "F113"),
    "more tables": (rows(EMISSIONS, 2 * N, R, V, D), "F113"),
    "flat tables": (rows(EMISSIONS, N * R * V, D), "F113"),
    "tables of experts": (rows(BASE, N, V, D), "F111"),
    "wiring with scales": (rows(SCOPE, N, 1), "F113"),
}


@pytest.mark.parametrize("name", WRONG)
def test_names_and_sizes_come_first(name: str, tmp_path: Path, nothing_is_made: None) -> None:
    changed, want = WRONG[name]
    write(tmp_path, head() | changed)
    assert code(tmp_path) == want


TRUNKS = {"F111": rows(TRUNK[0], 8, D), "F113": rows(TRUNK[0], 8, D) | rows(TRUNK[1], D + 1, 8)}


@pytest.mark.parametrize("want", TRUNKS)
def test_a_trunk_that_does_not_fit(want: str, tmp_path: Path, nothing_is_made: None) -> None:
    write(tmp_path, floats() | TRUNKS[want])
    assert code(tmp_path) == want


def floats() -> dict[str, Array]:
    """Return a head of float32."""
    rng = np.random.default_rng(0)
    state = {EMISSIONS: rng.random((N, R, V, D), np.float32), SCOPE: np.arange(N)[:, None]}
    return state | {SUM: rng.random((1, 1, R, D), np.float32)}


@pytest.mark.parametrize("other", [(1, 1, R, D + 1), (1, 1, R + 1, D), (1, 2, R, D), (R, D)])
def test_sums_of_another_size(
    other: tuple[int, ...], tmp_path: Path, nothing_is_made: None
) -> None:
    write(tmp_path, floats() | rows(SUM, *other))
    assert code(tmp_path) in ("F113", "F114")


def test_a_bias_of_another_size(tmp_path: Path, nothing_is_made: None) -> None:
    write(tmp_path, floats() | rows(SUM.replace("proj", "bias"), 1, 1, R + 1))
    assert code(tmp_path) == "F117"


def test_a_bias_is_broadcast(tmp_path: Path) -> None:
    state = floats() | rows(SUM.replace("proj", "bias"), 1, R)
    write(tmp_path, state)
    assert load(tmp_path).biases[0].shape == (1, 1, R)


@pytest.mark.parametrize("shared", [True, False])
def test_many_bombs(shared: bool, tmp_path: Path) -> None:
    """Forty matrices of 1 Mi numbers, 160 MB as float32, in a file of 0.1 or 5 MB."""
    state, spans = head(), {}
    begin = sum(v.nbytes for v in state.values())
    for end, value in zeros("", 256).items():
        state |= {f"mt_head.x{i}{end}": value for i in range(40)}
        if shared:
            spans |= {f"mt_head.x{i}{end}": [begin, begin + value.nbytes] for i in range(1, 40)}
            begin += value.nbytes
    path = write(tmp_path, state, **spans)
    assert (path.stat().st_size < 300_000) is shared
    tracemalloc.start()
    try:
        assert code(tmp_path) == ("F106" if shared else "F111")
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + (1 << 20)
    finally:
        tracemalloc.stop()


def test_rows_become_at_most_forty_times_as_large() -> None:
    """Eight for the integers and 32 for the floats, both in memory once."""
    named = zeros("T", 2048)
    size = sum(v.nbytes for v in named.values())
    assert 2048 * 4096 > 7.5 * size
    tracemalloc.start()
    try:
        assert not dequantise(named, "here")["T"].any()
        assert tracemalloc.get_traced_memory()[1] <= 40 * size + (1 << 18)
    finally:
        tracemalloc.stop()


A, B = np.arange(6, dtype=np.float32), np.arange(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("spans", "room", "what"),
    [
        ({"lm.b": [0, 16]}, 24, "within another"),
        ({"lm.b": [8, 24]}, 24, "within another"),
        ({"lm.b": [20, 36]}, 36, "within another"),
        ({"lm.b": [24, 40], "lm.none": [12, 12]}, 40, "within another"),
        ({"lm.b": [28, 44]}, 44, "bytes 24 to 28 of the data belong to no tensor"),
        ({"lm.b": [24, 40]}, 44, "bytes 40 to 44 of the data belong to no tensor"),
        ({"lm.b": [24, 40], "lm.none": [44, 44]}, 44, "bytes 40 to 44"),
    ],
)
def test_extents_that_overlap_or_leave_bytes(
    spans: dict[str, list[int]], room: int, what: str, tmp_path: Path
) -> None:
    tensors = {"lm.a": A, "lm.b": B} | ({"lm.none": B[:0]} if "lm.none" in spans else {})
    path = write(tmp_path, tensors, **spans)
    path.write_bytes(path.read_bytes() + bytes(room - A.nbytes))
    with pytest.raises(PccError, match=what) as caught:
        load(tmp_path)
    assert caught.value.code == "F106"


def test_extents_in_any_order_and_empty_ones(tmp_path: Path) -> None:
    state = head()
    order = dict(reversed(state.items()))
    write(tmp_path, {"lm.none": B[:0], **order, "lm.empty": B[:0]})
    assert load(tmp_path).emissions.shape == (N, R, V, D)


def test_views_of_one_storage_do_not_add_up(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write(tmp_path, {}).unlink()
    state = {k: torch.from_numpy(v.copy()) for k, v in floats().items()}
    torch.save(state, tmp_path / "model@1.pt")
    assert load(tmp_path).n == N
    shared = torch.zeros(1 << 16, dtype=torch.float16)
    state |= {f"mt_head.x{i}": shared[: (1 << 16) - i] for i in range(9)}
    torch.save(state, tmp_path / "model@1.pt")
    assert code(tmp_path) == "F106"


Q, SCALES = np.arange(-8, 8, dtype=np.int8).reshape(2, 8), np.ones(2, np.float16)
CODED = dict(zip(("T", "T.streams"), encode(Q), strict=True)) | {"T.scale": SCALES}
WHOLE = {"T": Q, "T.scale": SCALES}
PACKED = {"T": np.zeros((2, 8), np.uint8), "T.scale": SCALES, "T.bits": np.uint8(4)}


@pytest.mark.parametrize(
    ("named", "extra", "at"),
    [
        (WHOLE, {"T.bits": np.array(8, np.uint8)}, "T.bits"),
        (WHOLE, {"T.streams": CODED["T.streams"]}, "T.streams"),
        (WHOLE, {"T.streams": CODED["T.streams"], "T.bits": np.array(8, np.uint8)}, "T.bits"),
        (CODED, {"T": CODED["T"].view(np.int8)}, "T.streams"),
        (CODED, {"T.bits": np.array(3, np.uint8)}, "T.bits"),
        (PACKED, {"T.streams": CODED["T.streams"]}, "T.bits"),
        (PACKED, {"T.bits.scale": np.array(1, np.float16)}, "T.bits"),
        (WHOLE, {"T.scale": Q[:, 0], "T.scale.scale": np.array(1, np.float16)}, "T.scale"),
        (WHOLE, {"T": Q[0, 0], "T.scale": np.float16(1)}, "T.scale"),
        (PACKED, {"T": Q.view(np.uint8)[0, 0], "T.scale": np.float16(1)}, "T.bits"),
    ],
)
def test_parts_that_contradict(named: Any, extra: Any, at: str) -> None:
    assert set(dequantise(named, "here")) == {"T"}
    with pytest.raises(PccError) as caught:
        dequantise(named | extra, "here")
    assert (caught.value.code, caught.value.at) == ("F113", f"here:{at}")
