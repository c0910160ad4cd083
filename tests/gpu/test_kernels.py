"""The hand-written kernels on a GPU, against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from gpu_values import STEP, close, normal  # noqa: E402

from benchmarks.gpu.launcher import DTYPES, Module, room  # noqa: E402
from pcc.backends.cuda import library  # noqa: E402
from pcc.backends.cuda.gpu import TUNED  # noqa: E402
from pcc.backends.cuda.narrow import narrow  # noqa: E402
from pcc.backends.cuda.pack import interleave, pack_linear, strips_of  # noqa: E402

# ---------------------------------------------------------------- products

SHAPES = [(1, 4096, 4096), (16, 4096, 12288), (16, 11008, 4096), (8, 3072, 320), (5, 100, 259)]
LARGE = [(64, 4096, 1024), (33, 512, 268), (100, 256, 96), (256, 1024, 64), (16, 8, 24)]


def products():
    """Return the cases: kernel and what made it."""
    made = {}
    options = itertools.cycle(itertools.product(
        ("f16", "bf16"), ("none", "residual", "gated"), ("f32", "half", "norm"), (False, True),
    ))  # fmt: skip
    for index, (rows, k, n) in enumerate((SHAPES + LARGE) * 4):
        dtype, epilogue, source, bias = next(options)
        epilogue = "none" if epilogue == "gated" and n % 2 else epilogue
        case = {
            "rows": rows, "k": k, "n": n, "dtype": dtype, "epilogue": epilogue, "source": source,
            "bias": bias, "eps": 1e-5, "out": "half" if epilogue == "gated" else "f32",
            "squares": epilogue == "residual", "activation": ("silu", "gelu")[index % 2],
        }  # fmt: skip
        made[f"p{index}"] = case
        made[f"i{index}"] = case | {"integers": True}  # the same with 8-bit weights
    sources = ("f32", "half", "norm")
    ragged = [(5, 1000, 259), (9, 2056, 420), (11, 1032, 97), (3, 1240, 34), (1, 1032, 130)]
    for index, ((rows, k, n), source) in enumerate(itertools.product(ragged, sources)):
        gated = n == 34
        case = {
            "rows": rows, "k": k, "n": n, "dtype": ("f16", "bf16")[index % 2], "source": source,
            "epilogue": "gated" if gated else ("none", "residual")[index % 2], "eps": 1e-5,
            "bias": index % 3 == 0, "squares": not gated and index % 2 == 1,
            "out": "half" if gated else "f32",
        }  # fmt: skip
        for cluster in (1, 2):  # one launch of few rows, over one and two blocks
            made[f"n{index}_{cluster}"] = case | {"cluster": cluster}
            for warps in (8, 16):
                if narrow(rows, k, n, TUNED, "u8", source, warps, cluster):
                    how = {"integers": True, "warps": warps, "cluster": cluster}
                    made[f"m{index}_{warps}_{cluster}"] = case | how
    for index, (rows, k, n) in enumerate([(5, 100, 259), (16, 64, 96), (1, 320, 32)]):
        gated = n % 2 == 0 and index == 1
        made[f"w{index}"] = {
            "rows": rows, "k": k, "n": n, "dtype": "f32", "bias": True,
            "epilogue": "gated" if gated else "residual",
        }  # fmt: skip
    return made


PRODUCTS = products()
assert {(c.get("warps"), c.get("cluster")) for c in PRODUCTS.values()} >= {
    (w, c) for w in (8, 16) for c in (1, 2)
}


@pytest.fixture(scope="module")
def module():
    kernels = [library.linear(name, **case) for name, case in PRODUCTS.items()]
    return Module(kernels + OTHERS), {k.name: k for k in kernels}


def packed(w):
    if w.dtype == torch.int8:
        return torch.from_numpy(pack_linear(w.cpu().numpy())).cuda()
    kind = np.int16 if w.element_size() == 2 else np.int32
    bits = pack_linear(w.cpu().view(torch.int16 if kind == np.int16 else torch.int32).numpy())
    return torch.from_numpy(bits).view(w.dtype).cuda()


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_a_product_is_that_of_the_rounded_input(module, name):
    loaded, kernels = module
    case, kernel = PRODUCTS[name], kernels[name]
    rows, k, n, dtype = case["rows"], case["k"], case["n"], DTYPES[case["dtype"]]
    tensors = {a.name: room(a) for a in kernel.args}
    source = case.get("source", "f32")
    x = normal(rows, k, dtype=dtype if source == "half" else torch.float32)
    integers = case.get("integers", False)
    if integers:
        w = torch.randint(-128, 128, (k, n), device="cuda").to(torch.int8)
        scales = (0.5 + torch.rand(n, device="cuda")) * k**-0.5 / 127
    else:
        w = normal(k, n, scale=k**-0.5, dtype=dtype)
    tensors["x"] = x
    entry = x.double()
    if source == "norm":
        gain = 1 + 0.1 * normal(k)
        padded = torch.zeros(rows, strips_of(k) * 32, device="cuda")
        padded[:, :k] = x
        tensors["gain"] = gain
        tensors["squares"] = padded.view(rows, -1, 32).square().sum(-1).contiguous()
        scale = (entry.square().mean(-1, keepdim=True) + case["eps"]).rsqrt()
        entry = entry * scale * gain.double()
    z = entry.to(dtype).double() @ w.double()
    z = z * scales.double() if integers else z
    bias = normal(n) if case["bias"] else None
    z = z if bias is None else z + bias.double()
    gated = case["epilogue"] == "gated"
    if gated:
        order = torch.from_numpy(interleave(np.arange(n))).cuda()
        w, bias = w[:, order], None if bias is None else bias[order].contiguous()
        scales = scales[order].contiguous() if integers else None
        gate, up = z[:, : n // 2], z[:, n // 2 :]
        act = (
            torch.nn.functional.gelu
            if case.get("activation") == "gelu"
            else torch.nn.functional.silu
        )
        z = act(gate) * up
    tensors["w"] = packed(w.contiguous())
    if bias is not None:
        tensors["bias"] = bias
    if integers:
        tensors["scales"] = scales
    before = normal(rows, n) if case["epilogue"] == "residual" else None
    results = []
    for _ in range(2):
        if before is not None:
            tensors["y"] = before.clone()
        loaded.launch(kernel, tensors)
        results.append(tensors["y"].clone())
    assert torch.equal(*results), "the sum depends on who came last"
    want = z if before is None else z + before.double()
    # Of the norm, one rounding of the input may fall the other way.
    error = 3e-6 if source != "norm" else STEP[case["dtype"]] / 20
    close(results[0], want, error + (STEP[case["dtype"]] if case.get("out") == "half" else 0))
    if case.get("squares"):
        full = torch.zeros(rows, strips_of(n) * 32, dtype=torch.float64, device="cuda")
        full[:, :n] = results[0].double()
        close(tensors["squares_out"], full.view(rows, -1, 32).square().sum(-1), 1e-6)
    for a in kernel.args:
        assert not a.zero or not tensors[a.name].any()


# ---------------------------------------------------------------- norms and look-ups

OTHERS = [
    library.rms_norm("norm16", rows=5, width=4096, eps=1e-5, dtype="bf16", wide=True),
    library.rms_norm("norm32", rows=3, width=100, eps=1e-5),
    library.embedding("embed", rows=9, vocab=320, width=4000, dtype="f16", squares=True),
]


@pytest.mark.parametrize("which", [0, 1])
def test_a_norm(module, which):
    kernel = OTHERS[which]
    tensors = {a.name: room(a) for a in kernel.args}
    x, gain = normal(*kernel.args[0].shape), normal(*kernel.args[1].shape)
    module[0].launch(kernel, tensors | {"x": x, "gain": gain})
    wide = x.double()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
    close(tensors["y"], want, 1e-6 if which else STEP["bf16"])
    if not which:
        close(tensors["y32"], want, 1e-6)


def test_a_look_up(module):
    kernel = OTHERS[2]
    tensors = {a.name: room(a) for a in kernel.args}
    tensors["table"] = normal(320, 4000, dtype=torch.float16)
    tensors["ids"] = torch.tensor([0, 319, 5, 5, -1, 320, 7, 1 << 40, 2]).cuda()
    module[0].launch(kernel, tensors)
    want = tensors["table"][tensors["ids"].clamp(0, 319)].float()
    assert torch.equal(tensors["y"], want)
    close(tensors["squares_out"], want.double().view(9, -1, 32).square().sum(-1), 1e-6)
