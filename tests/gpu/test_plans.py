"""Each launch of whole plans on a GPU, alone, over the arrays that the host's run has there.

What a launch writes is compared with what its stand-in (a hand-written kernel) or the same source
as C++ (a generated one) writes from the same arrays, so that a fault has the name of its kernel.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from cuda_plans import ordered, plan_of, random_inputs

from pcc.backends.cuda import nvcc
from pcc.backends.cuda.gpu import gpu_of
from pcc.backends.cuda.kernel import READ, SCRATCH
from pcc.backends.cuda.simulator import Simulator
from pcc.conformance import verifiers
from pcc.conformance.models import WIDE
from pcc.errors import PccError
from pcc.runtime.device.driver import Device
from pcc.runtime.device.handles import Kernel

try:
    GPU = Device()
    nvcc.find()
except PccError as e:
    pytest.skip(e.what, allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("no g++ is here: the host cannot run plans", allow_module_level=True)

VOCAB = {"evabyte": 320, "byte_llama": 268}
# Of the largest number of an array: sums in another order, and one rounding to the other side.
BOUND = {"f32": 2e-4, "f16": 4e-3, "bf16": 3e-2}
CASES = [
    ("llama", {"kind": "hmm", "size": WIDE}, "fp16", 1, ("step", "prefill", "decode")),
    ("llama", {"kind": "btree", "n": 8, "size": WIDE}, "bf16", 3, ("step", "step_greedy")),
    ("evabyte", {"kind": "btree", "n": 16, "size": WIDE}, "fp16", 1, ("step", "prefill")),
    ("evabyte", {"size": WIDE}, "bf16", 3, ("verify", "decode")),
    ("byte_llama", {"n": 8}, "fp32", 1, ("step", "prefill_greedy")),
    ("lora", {}, "fp16", 1, ("step",)),
    ("gpt", {}, "fp32", 3, ("step", "decode")),
    ("llama", {"kind": "btree", "n": 8, "size": WIDE}, "bf16+int8", 3, ("step", "step_greedy")),
    ("evabyte", {"kind": "btree", "n": 16, "size": WIDE}, "fp16+int8", 1, ("step", "prefill")),
    ("lora", {}, "bf16+int8", 1, ("step",)),
]


class Compared:
    """Runs each launch on the GPU beside the host's, and notes the largest difference."""

    def __init__(self, builder):
        arch = GPU.arch
        code = nvcc.compile_all({"plan": builder.source()}, arch)["plan"]
        names = {x.kernel.name for x in builder.launches}
        self.functions = GPU.load(code, sorted(names))
        self.stream = GPU.stream()
        self.wrong = []

    def __call__(self, launch, arrays):
        kernel = launch.kernel
        before = {a.name: np.array(arrays[a.name]) for a in kernel.args}  # copies
        places = {}
        for at, a in zip(launch.args, kernel.args, strict=True):
            if at not in places:
                size = before[a.name].nbytes
                places[at] = GPU.allocate(size)
                GPU.upload(places[at], before[a.name].ctypes.data, size, self.stream)
        function = self.functions[kernel.name]
        GPU.allow_shared(function, kernel.shared)
        how = Kernel(
            function, kernel.grid, kernel.block, kernel.shared, kernel.cooperative, kernel.overlap
        )
        GPU.start(how, [places[at] for at in launch.args], self.stream)
        GPU.wait(self.stream)
        made = {}
        for at, a in zip(launch.args, kernel.args, strict=True):
            made[a.name] = np.empty_like(before[a.name])
            GPU.download(made[a.name].ctypes.data, places[at], made[a.name].nbytes, self.stream)
        GPU.wait(self.stream)
        for place in places.values():
            GPU.release(place)
        return lambda: self.compare(launch, arrays, made)

    def compare(self, launch, arrays, made):
        """Note arguments that the GPU wrote otherwise than the host."""
        for a in launch.kernel.args:
            want, got = np.array(arrays[a.name]), made[a.name]
            if a.role == SCRATCH and a.zero and got.any():
                self.note(launch, a, "is not zero again")
            if a.role in (READ, SCRATCH):
                continue
            if a.dtype not in BOUND:
                if (want != got).any():
                    self.note(launch, a, f"{want.reshape(-1)[:8]} came out {got.reshape(-1)[:8]}")
                continue
            want, got = want.astype(np.float64), got.astype(np.float64)
            known = np.isfinite(want)  # the host fills memory that nobody has written with NaN
            if (np.isnan(got) & known).any() or (np.isinf(want) != np.isinf(got)).any():
                self.note(launch, a, "holds NaN or other infinities")
                continue
            off = np.abs(want[known] - got[known]).max(initial=0.0)
            scale = max(1.0, np.abs(want[known]).max(initial=0.0))
            if off > BOUND[a.dtype] * scale:
                self.note(launch, a, f"is off by {off:.3g}, its largest number is {scale:.3g}")

    def note(self, launch, a, what):
        head = launch.kernel.source.partition("\n")[0]
        self.wrong.append(f"{launch.layer or launch.op.name} ({head}): {a.name} {what}")


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}-{c[3]}")
def test_each_launch_does_what_the_host_does(case, tmp_path, monkeypatch):
    name, options, precision, batch, queries = case
    source, folder = getattr(verifiers, name)(tmp_path, **options)
    half, _, int8 = precision.partition("+")
    order = ordered(source, folder, monkeypatch, queries=["draft"], precision=half,
                    int8="all" if int8 else None, batch=batch)  # fmt: skip
    for query in queries:
        e = order.emissions[query]
        feed = random_inputs(e, batch, np.random.default_rng(1), VOCAB.get(name, 258))
        builder = plan_of(e, batch, gpu_of(None))
        compared = Compared(builder)
        Simulator(builder).run({k: v.copy() for k, v in feed.items()}, compared)
        assert not compared.wrong, f"{query}:\n" + "\n".join(compared.wrong)
