"""The torch circuits against pcc's evaluator, against each other and against finite differences."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import pcc  # noqa: E402
from pcc.errors import PccError  # noqa: E402
from pcc.frontends.coded import encode  # noqa: E402
from pcc.frontends.mtpc import load_mtpc  # noqa: E402
from pcc.frontends.mtpc_checkpoint import load  # noqa: E402
from pcc.frontends.region_wiring import parse_regions, show_regions  # noqa: E402
from pcc.frontends.rows import quantise  # noqa: E402
from pcc.frontends.scaled import dequantise  # noqa: E402
from pcc.interp.reference import reference  # noqa: E402
from pcc.train import config as cfg  # noqa: E402
from pcc.train import drafts  # noqa: E402
from pcc.train.files import read_tensors, read_weights, write_tensors  # noqa: E402
from pcc.train.head import CircuitHead  # noqa: E402
from pcc.train.layout import quantise_head, read_head, save_head  # noqa: E402

N, V, D = 4, 5, 6
# A region with two partitions, and regions that two others read: no tree.
DAG = (
    '{"scopes": [[0],[1],[2],[3],[0,2],[1,3],[0,1],[2,3],[1,2,3],[0,1,2,3]],'
    ' "partitions": [[],[],[],[],[[0,2]],[[1,3]],[[0,1]],[],[[1,7],[2,5]],[[4,5],[6,7],[0,8]]]}'
)
REGIONS = {"tree": "[[0,2],[3,1]]", "region-graph": DAG}
KINDS = ("ff", "cp", "hmm", "btree", *REGIONS)
FORMS = ("linear", "low-rank")


def made(kind: str, form: str = "linear", **more: object) -> CircuitHead:
    more = {"regions": REGIONS.get(kind, ""), **more}
    sizes = cfg.Head(kind=kind, n=N, r=3, emissions=form, rank=2, **more)  # type: ignore[arg-type]
    head = CircuitHead(sizes, V, D, seed=3)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in head.parameters():
            p += 0.7 * torch.randn(p.shape, generator=g)
    return head


def stored(head: CircuitHead, folder: Path) -> Path:
    run = cfg.Run(storage="f32")
    c = cfg.Config(kind="head", out=str(folder), head=head.sizes, run=run)
    save_head(folder, c, head, None, 7)
    return folder


def batch(rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, D)).astype(np.float32), rng.integers(V, size=(rows, N))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_equals_the_imported_circuit(tmp_path: Path, kind: str, form: str) -> None:
    head = made(kind, form, trunk=5)
    e, x = batch()
    circuit = load_mtpc(stored(head, tmp_path))
    want = reference(circuit, "prefix", {"x": x, "context": e})["log_cond"]
    with torch.no_grad():
        got = head(torch.from_numpy(e), torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(np.diff(want, axis=0)).max() > 0.1  # the context matters


@pytest.mark.parametrize(("kind", "form"), [("hmm", "low-rank"), ("btree", "linear")])
def test_likelihood_equals_the_compiled_circuit(tmp_path: Path, kind: str, form: str) -> None:
    pytest.importorskip("onnxruntime")
    head = made(kind, form, trunk=5)
    e, x = batch(3)
    out = tmp_path / "m.pcc"
    pcc.compile(stored(head, tmp_path / "head"), queries=["prefix"], out=out, validate=False)
    got = pcc.load(out).run("prefix", x=x, context=e)["log_cond"]
    with torch.no_grad():
        want = head(torch.from_numpy(e), torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_low_rank_products_are_not_expanded(tmp_path: Path) -> None:
    head = load(stored(made("cp", "low-rank"), tmp_path))
    assert head.experts is not None
    assert (head.emissions.shape, head.experts.factor.shape) == ((N, 1, V, D), (N, 3, V, 2))
    shapes = {n.type.shape for n in load_mtpc(tmp_path).module().nodes() if n.name == "t.const"}
    assert (N, 3, V, D) not in shapes


def test_stored_rows_are_read_back(tmp_path: Path) -> None:
    folder = stored(made("btree", "low-rank", trunk=5), tmp_path / "a")
    quantise_head(folder, tmp_path / "b")
    a, b = load(folder), load(tmp_path / "b")
    for x, y in ((a.emissions, b.emissions), (a.sums[0], b.sums[0])):
        bound = np.abs(x).max(-1, keepdims=True) / 253 + 1e-6
        assert (np.abs(x - y) <= bound).all()
        assert (x != y).any()
    tensors, meta = read_tensors(next((tmp_path / "b").glob("*.safetensors")))
    whole = {k.removesuffix(".streams") for k in tensors if k.endswith(".streams")}
    assert {k.rpartition(".")[2] for k in whole} == {"base", "factor", "code", "proj", "up", "down"}
    assert {tensors[k].dtype for k in whole} == {torch.uint8}
    assert meta["storage"] == "8-bit rows, coded"


def packed(rows: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Return `bits` bits of each number, the highest first, as the documentation says."""
    width, top = rows.shape[-1], 1 << bits - 1
    texts = ["".join(f"{v + top:0{bits}b}" for v in r) for r in rows.reshape(-1, width).tolist()]
    raw = [int(text, 2).to_bytes(width * bits // 8, "big") for text in texts]
    shape = (*rows.shape[:-1], width * bits // 8)
    return {
        "T": np.frombuffer(b"".join(raw), np.uint8).reshape(shape),
        "T.bits": np.array(bits, np.uint8),
    }


@pytest.mark.parametrize("form", ["whole", "packed", "coded"])
@pytest.mark.parametrize("bits", [8, 7, 4])
def test_rows_are_read_by_compiler_and_training(bits: int, form: str, tmp_path: Path) -> None:
    values = np.random.default_rng(bits).normal(size=(3, 5, 16)).astype(np.float32)
    rows, scale = quantise(values, bits)
    made = {
        "whole": lambda: {"T": rows},
        "packed": lambda: packed(rows, bits),
        "coded": lambda: dict(zip(("T", "T.streams"), encode(rows), strict=True)),
    }
    stored = made[form]() | {"T.scale": scale}
    write_tensors(tmp_path / "t.safetensors", {k: torch.tensor(v) for k, v in stored.items()})
    back = read_weights(tmp_path / "t.safetensors")
    assert set(back) == set(dequantise(stored, "here")) == {"T"}
    np.testing.assert_array_equal(back["T"].numpy(), dequantise(stored, "here")["T"])
    np.testing.assert_array_equal(back["T"].numpy(), rows * np.float32(scale)[..., None])
    bound = np.abs(values).max(-1, keepdims=True) / (2**bits - 2) * 1.01
    assert (np.abs(back["T"].numpy() - values) <= bound).all()
    with pytest.raises(PccError, match="F104" if form == "coded" else "F113"):
        dequantise(stored | {"T.scale": scale[:-1]}, "here")


@pytest.mark.parametrize("kind", KINDS)
def test_recursion_in_order_equals_the_one_by_cuts(kind: str) -> None:
    head = made(kind)
    e, x = (torch.from_numpy(v) for v in batch())
    with torch.no_grad():
        got, rows = head(e, x), head.log_rows(e, x)
        assert head.circuit.ordered is (kind not in REGIONS)
        head.circuit.ordered = False
        torch.testing.assert_close(got, head(e, x), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows, head.log_rows(e, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_repetitions_and_shuffled_trees(tmp_path: Path, shuffle: bool) -> None:
    head = made("btree", repetitions=2, shuffle=shuffle)
    e, x = batch()
    assert head.circuit.ordered is not shuffle
    with torch.no_grad():
        every = torch.cartesian_prod(*[torch.arange(V)] * N)
        one = torch.from_numpy(e[:1]).expand(len(every), D)
        total = head(one, every).sum(-1).exp().sum()
        got = head(torch.from_numpy(e), torch.from_numpy(x)).double()
        each, rows = head.log_rows(torch.from_numpy(e), torch.from_numpy(x))
    assert float(total) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(each.double(), got, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(e), N), atol=1e-5, rtol=0)
    if not shuffle:
        want = reference(load_mtpc(stored(head, tmp_path)), "prefix", {"x": x, "context": e})
        np.testing.assert_allclose(got.numpy(), want["log_cond"], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_conditionals(kind: str) -> None:
    head = made(kind, "low-rank")
    e, x = (torch.from_numpy(v) for v in batch())
    with torch.no_grad():
        each, rows = head.log_rows(e, x)
        torch.testing.assert_close(each, head(e, x), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(e), N), atol=1e-5, rtol=0)
        for v in range(V):
            y = x.clone()
            y[:, 2] = v
            torch.testing.assert_close(rows[:, 2, v], head(e, y)[:, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(kind: str, form: str) -> None:
    head = made(kind, form, trunk=3).double()
    e, x = (torch.from_numpy(v) for v in batch(2))
    e = e.double()
    gamma = 0.9 ** torch.arange(N, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return -(head(e, x) * gamma).sum()

    loss().backward()
    rng = np.random.default_rng(2)
    for name, p in head.named_parameters():
        assert p.grad is not None
        for at in rng.integers(p.numel(), size=3):
            flat, h = p.data.view(-1), 1e-5
            keep = flat[at].item()
            with torch.no_grad():
                flat[at] = keep + h
                up = loss().item()
                flat[at] = keep - h
                down = loss().item()
                flat[at] = keep
            want = (up - down) / (2 * h)
            assert p.grad.view(-1)[at].item() == pytest.approx(want, rel=1e-5, abs=1e-7), name


def test_identity_transitions_start_as_a_mixture() -> None:
    sizes = cfg.Head(kind="hmm", n=N, r=3, identity=60.0)
    hmm = CircuitHead(sizes, V, D, seed=3)
    cp = CircuitHead(dataclasses.replace(sizes, kind="cp"), V, D, seed=3)
    with torch.no_grad():
        cp.proj.copy_(hmm.proj.flip(0))  # HMM folds are stored last token first
        cp.sums[0].copy_(hmm.sums[-1])
        e, x = (torch.from_numpy(v) for v in batch())
        torch.testing.assert_close(hmm(e, x), cp(e, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts(kind: str, tmp_path: Path) -> None:
    head = made(kind, "low-rank")
    e, x = batch(5)
    carry = torch.from_numpy(x[:, 0])
    with torch.no_grad():
        got = drafts.draft(head, torch.from_numpy(e), carry)
        _, rows = head.log_rows(torch.from_numpy(e), got["stepwise"])
    circuit = load_mtpc(stored(head, tmp_path))
    assert (rows[:, 1:].argmax(-1) == got["stepwise"][:, 1:]).all()
    # The best completion of the carry, over latents and tokens together, by the evaluator.
    seen = np.zeros((5, N), bool)
    seen[:, 0] = True
    want = reference(circuit, "mode", {"x": x, "observed": seen, "context": e})
    y = got["max_product"].numpy()
    full = np.ones((5, N), bool)
    best = reference(circuit, "mode", {"x": y, "observed": full, "context": e})
    np.testing.assert_allclose(best["log_value"], want["log_value"], atol=1e-5)
    for d in got.values():
        assert (d[:, 0] == carry).all()


def test_bad_heads_are_refused() -> None:
    for sizes, code in (
        (cfg.Head(kind="chain"), "N111"),
        (cfg.Head(kind="tree", n=4), "N111"),
        (cfg.Head(kind="cp", regions="balanced"), "N111"),
        (cfg.Head(kind="tree", n=4, regions=DAG), "N111"),
        (cfg.Head(kind="tree", n=5, regions=REGIONS["tree"]), "T102"),
        (cfg.Head(kind="cp", repetitions=2), "N111"),
        (cfg.Head(kind="btree", n=6), "N111"),
    ):
        with pytest.raises(PccError) as e:
            CircuitHead(sizes, V, D)
        assert e.value.code == code


@pytest.mark.parametrize("regions", ["balanced", "random:3", "shuffled:1", *REGIONS.values()])
def test_wiring_of_a_region_graph_is_that_of_the_template(regions: str) -> None:
    """Equal weights give equal likelihoods, though the two are built apart."""
    head = made("region-graph", regions=regions)
    e, x = batch()
    weights = {"emissions": head.proj.detach().numpy(),
               "sums": [p.detach().numpy() for p in head.sums]}  # fmt: skip
    with torch.no_grad():
        for b in head.sum_biases:
            b.zero_()
        got = head(torch.from_numpy(e), torch.from_numpy(x)).numpy()
    graph = parse_regions(regions, N)
    assert parse_regions(show_regions(graph), N) == graph
    circuit = pcc.templates.region_graph(graph, 3, V, context=D, weights=weights)
    want = reference(circuit, "prefix", {"x": x, "context": e})["log_cond"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_heads_over_regions_are_read_back(tmp_path: Path) -> None:
    head = made("region-graph")
    backbone = type("B", (), {})()
    again, draft = read_head(stored(head, tmp_path), backbone)
    assert draft is None
    e, x = (torch.from_numpy(v) for v in batch())
    with torch.no_grad():
        torch.testing.assert_close(again(e, x), head(e, x))


BAD_REGIONS = [
    "", "oak", "random:x", "random:-1", "[[0,1],[2]]", "[0,1,2,3,4]", "[[0,1],[1,2]]", "{}", "7",
    '{"scopes": 3, "partitions": 4}', '{"scopes": [[0,-1]], "partitions": [[]]}', "[" * 9999,
    '{"scopes": [[0,1,2,3]], "partitions": [[[9,9]]]}',
    '{"scopes": [[99999999999]], "partitions": [[]]}',
    '{"scopes": [[0],[1,2,3],[0,1,2,3]], "partitions": [[],[],[[0,1],[1]]]}',
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_REGIONS)
def test_bad_region_graphs_are_refused(text: str) -> None:
    with pytest.raises(PccError) as e:
        parse_regions(text, N, "here")
    assert e.value.code in ("T100", "T102")
    assert e.value.at == "here"
