"""Attention on a GPU against float64, and launches that overlap."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from gpu_values import STEP, close, normal  # noqa: E402

from benchmarks.gpu.launcher import DTYPES, Module, room  # noqa: E402
from pcc.backends.cuda import library  # noqa: E402


def attends():
    """Return name -> kernel, its sizes, starts to try."""
    made = {}
    plain = [
        ("f16", 1, 8, 24, 8, 128, 2064, 64, 0, ([0], [1], [777], [2056])),
        ("bf16", 1, 16, 32, 32, 128, 1100, 64, 0, ([1024], [37])),
        ("f16", 3, 5, 4, 2, 64, 200, 16, 0, ([0, 17, 195],)),
        ("bf16", 2, 33, 6, 2, 32, 128, 16, 20, ([0, 95], [40, 3])),
        ("f16", 1, 1, 8, 8, 48, 64, 3, 0, ([63],)),
        ("f16", 2, 100, 2, 1, 16, 300, 0, 0, ([200, 9],)),
    ]
    for i, (dtype, batch, count, heads, keys, width, rows, angles, window, starts) in enumerate(
        plain
    ):
        sizes = dict(
            batch=batch, count=count, heads=heads, key_heads=keys, width=width, rows=rows,
            angles=angles, positions=rows + 7, scale=width**-0.5, dtype=dtype, window=window,
        )  # fmt: skip
        made[f"a{i}"] = (library.attend(f"a{i}", **sizes), sizes, starts)
    eva = [
        ("bf16", 1, 16, 32, 128, 2304, 257, 64, 2048, 16, ([0], [1024], [2040], [2048], [4090])),
        ("f16", 2, 8, 4, 64, 40, 40, 32, 32, 4, ([0, 30], [31, 64], [120, 97], [61, 5])),
        ("f16", 1, 40, 2, 32, 80, 60, 8, 32, 8, ([0], [50], [100], [201])),
    ]
    for i, (
        dtype,
        batch,
        count,
        heads,
        width,
        ring,
        older,
        angles,
        window,
        chunk,
        starts,
    ) in enumerate(eva):
        sizes = dict(
            batch=batch, count=count, heads=heads, width=width, ring=ring, older=older,
            angles=angles, positions=5000, scale=width**-0.5, window=window, chunk=chunk,
            dtype=dtype,
        )  # fmt: skip
        made[f"e{i}"] = (library.eva_attend(f"e{i}", **sizes), sizes, starts)
    return made


ATTENDS = attends()


def rotate(x, cos, sin):
    """Turn x [N,H,hd] by tables [N,r]."""
    r = cos.shape[-1]
    c, s = cos[:, None], sin[:, None]
    low, high = x[..., :r], x[..., r : 2 * r]
    return torch.cat([low * c - high * s, high * c + low * s, x[..., 2 * r :]], -1)


def softmaxed(q, keys, values, scale):
    """One query [hd] over keys [n,hd]."""
    return torch.softmax(scale * (keys @ q), 0) @ values


def setting(kernel, sizes, start):
    """Return random inputs, with caches full of values that a wrong read would take."""
    tensors = {a.name: room(a) for a in kernel.args}
    for a in kernel.args:
        if a.role in ("read", "update") and a.dtype in ("f32", "f16", "bf16"):
            tensors[a.name] = normal(*a.shape, dtype=DTYPES[a.dtype])
    if sizes["angles"]:
        angle = torch.rand(sizes["positions"], sizes["angles"], device="cuda") * 6
        tensors["cos"], tensors["sin"] = angle.cos(), angle.sin()
    tensors["start"] = torch.tensor(start).cuda()
    return tensors


def projected(tensors, sizes, b):
    """Return turned q, turned and rounded k, rounded v of one batch row, [N,H,hd] in float64."""
    count, width, heads = sizes["count"], sizes["width"], sizes["heads"]
    keys = sizes.get("key_heads", heads)
    rows = tensors["qkv"].view(sizes["batch"], count, heads + 2 * keys, width)[b].double()
    q, k, v = rows[:, :heads], rows[:, heads : heads + keys], rows[:, heads + keys :]
    at = int(tensors["start"][b]) + torch.arange(count).cuda()
    if sizes["angles"]:
        q, k = (rotate(x, tensors["cos"][at].double(), tensors["sin"][at].double()) for x in (q, k))
    dtype = DTYPES[sizes["dtype"]]
    return q.to(dtype).double(), k.to(dtype), v.to(dtype)


def written(got, want, before, step):
    """Compare a cache: within a rounding where it was written, else untouched.

    What is written may happen to be what was there, of 16 bits in one number of some hundred.
    """
    got, want, before = got.double(), want.double(), before.double()
    far = (got - want).abs() > step * want.abs() + 1e-5 * want.abs().max()
    where = far.nonzero()[:8].tolist()
    assert not where, [(at, float(got[tuple(at)]), float(want[tuple(at)])) for at in where]
    by_chance = ((want == before) & (got != before)).sum()
    assert int(by_chance) <= int((want != before).sum()) // 50


@pytest.fixture(scope="module")
def module():
    return Module([k for k, *_ in ATTENDS.values()] + [k for k, _ in CHAIN])


CASES = [(n, s) for n, (_, _, starts) in ATTENDS.items() for s in range(len(starts))]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_attention_reads_and_writes_what_the_ops_say(module, name, index):
    kernel, sizes, starts = ATTENDS[name]
    tensors = setting(kernel, sizes, starts[index])
    before = {k: v.clone() for k, v in tensors.items()}
    module.launch(kernel, tensors)
    first = tensors["y"].clone()
    again = before | {"partial": tensors["partial"], "done": tensors["done"]}
    caches = {k: again[k].clone() for k in again if k.endswith(("key", "value"))}
    module.launch(kernel, again | caches)
    assert torch.equal(first, again["y"]), "the sum depends on who came last"
    assert not tensors["done"].any()
    eva = name.startswith("e")
    for b in range(sizes["batch"]):
        want = eva_reference(before, sizes, b, tensors) if eva else reference(before, sizes, b)
        count = sizes["count"]
        y = first.view(sizes["batch"], count, -1)[b]
        close(y, want.pop("y").reshape(count, -1), 0.6 * STEP[sizes["dtype"]])
        for key, value in want.items():
            written(tensors[key][b], value, before[key][b], STEP[sizes["dtype"]])


def reference(tensors, sizes, b):
    q, k, v = projected(tensors, sizes, b)
    start, count = int(tensors["start"][b]), sizes["count"]
    key, value = tensors["key"][b].clone(), tensors["value"][b].clone()
    key[:, start : start + count], value[:, start : start + count] = (
        k.transpose(0, 1),
        v.transpose(0, 1),
    )
    group = sizes["heads"] // sizes["key_heads"]
    y = torch.empty_like(q)
    for i in range(count):
        end = start + i + 1
        low = max(0, end - sizes["window"]) if sizes["window"] else 0
        for h in range(sizes["heads"]):
            keys, values = (c[h // group, low:end].double() for c in (key, value))
            y[i, h] = softmaxed(q[i, h], keys, values, sizes["scale"])
    return {"y": y, "key": key, "value": value}


def eva_reference(tensors, sizes, b, after):
    """Return what is expected; summaries are those of the keys and values that `after` holds.

    A key that lies between two halves may be rounded to the other one, which moves all weights of
    its chunk by more than a rounding of the summary. Keys and values are compared by themselves.
    """
    q, k, v = projected(tensors, sizes, b)
    start, count, chunk = int(tensors["start"][b]), sizes["count"], sizes["chunk"]
    names = ("key", "value", "summary_key", "summary_value")
    key, value, older_key, older_value = (tensors[n][b].clone() for n in names)
    at = (start + torch.arange(count).cuda()) % sizes["ring"]
    key[:, at], value[:, at] = k.transpose(0, 1), v.transpose(0, 1)
    first = start // chunk
    for c in range(first, first + (count + chunk - 2) // chunk + 1):
        rows = torch.arange(c * chunk, (c + 1) * chunk).cuda() % sizes["ring"]
        ks, vs = (after[n][b][:, rows].double() for n in ("key", "value"))
        mu, phi = (tensors[n].double()[:, None] for n in ("mu", "phi"))
        half = 0.5 / math.sqrt(sizes["width"])
        near = torch.softmax(((phi - half * ks) * ks).sum(-1, keepdim=True), 1)
        older_key[:, c] = (torch.softmax((mu * ks).sum(-1, keepdim=True), 1) * ks).sum(1)
        older_value[:, c] = (near * vs).sum(1)
    y = torch.empty_like(q)
    for i in range(count):
        p = start + i
        w = p // sizes["window"] * sizes["window"]
        rows, past = torch.arange(w, p + 1).cuda() % sizes["ring"], w // chunk
        for h in range(sizes["heads"]):
            keys = torch.cat([key[h, rows], older_key[h, :past]]).double()
            values = torch.cat([value[h, rows], older_value[h, :past]]).double()
            y[i, h] = softmaxed(q[i, h], keys, values, sizes["scale"])
    return dict(zip(("y", *names), (y, key, value, older_key, older_value), strict=True))


# ---------------------------------------------------------------- launches that overlap


def layers():
    """Return the launches of an embedding and two EVA layers, each with the buffers it shares."""
    rows, d, inner, heads = 16, 1024, 2752, 8
    sizes = {"rows": rows, "dtype": "bf16"}
    back = {"x": "y", "y": "stream", "squares_out": "squares"}
    norm, residual = {"source": "norm", "eps": 1e-5}, {"source": "half", "squares": True}
    residual["epilogue"] = "residual"
    made = [
        (library.embedding("c_embed", vocab=320, width=d, squares=True, **sizes),
         {"y": "stream", "squares_out": "squares", "ids": "ids"}),
    ]  # fmt: skip
    for i in range(2):
        qkv = library.linear(f"c_qkv{i}", k=d, n=3 * d, **norm, **sizes)
        attend = library.eva_attend(
            f"c_attend{i}", batch=1, count=rows, heads=heads, width=128, ring=2304, older=257,
            angles=64, positions=5000, scale=128**-0.5, window=2048, chunk=16, dtype="bf16",
        )  # fmt: skip
        out = library.linear(f"c_out{i}", k=d, n=d, **residual, **sizes)
        up = library.linear(
            f"c_up{i}", k=d, n=2 * inner, epilogue="gated", out="half", **norm, **sizes
        )
        down = library.linear(f"c_down{i}", k=inner, n=d, **residual, **sizes)
        made += [
            (qkv, {"x": "stream", "squares": "squares", "y": "qkv"}),
            (attend, {"qkv": "qkv", "y": "y", "start": "start"}), (out, back),
            (up, {"x": "stream", "squares": "squares", "y": "gated"}),
            (down, back | {"x": "gated"}),
        ]  # fmt: skip
    return made


CHAIN = layers()


def test_launches_that_overlap_compute_the_same_bits(module):
    shared, launches = {}, []
    for kernel, names in CHAIN:
        mine = setting(kernel, {"angles": 0}, [2040])
        for a in kernel.args:
            if a.dtype == "i64" and a.name != "start":
                mine[a.name] = room(a)
            elif a.role == "read" and a.name in ("w", "table"):
                mine[a.name] = normal(*a.shape, scale=0.03, dtype=DTYPES[a.dtype])
        for name, buffer in names.items():
            mine[name] = shared.setdefault(buffer, mine[name])
        launches.append((kernel, mine))
    shared["ids"].copy_(torch.arange(16) * 19)

    def run(overlap):
        for _ in range(3):  # so that the first launch has one before it
            for kernel, mine in launches:
                module.launch(kernel, mine, overlap)
        torch.cuda.synchronize()
        caches = [m[x].clone() for _, m in launches for x in ("key", "summary_value") if x in m]
        return [shared["stream"].clone(), *caches]

    want = run(False)
    assert torch.isfinite(want[0]).all()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(50):
            for buffer in ("stream", "qkv", "y", "gated", "squares"):
                shared[buffer].fill_(float("nan"))
            assert all(map(torch.equal, run(True), want))
