"""Kernels of the library on torch tensors: compile, load, launch. For tests and measurements."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pcc.backends.cuda import nvcc
from pcc.backends.cuda.kernel import Argument, Kernel

DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "u32": torch.int32, "u8": torch.uint8,
}  # fmt: skip


def here() -> str:
    """Return the architecture of the GPU."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def room(argument: Argument) -> torch.Tensor:
    """Return a new array: zeros where the kernel wants them, NaN (or all bits) elsewhere."""
    dtype = DTYPES[argument.dtype]
    if argument.zero:
        return torch.zeros(argument.shape, dtype=dtype, device="cuda")
    fill = float("nan") if dtype.is_floating_point else 255 if dtype == torch.uint8 else -1
    return torch.full(argument.shape, fill, dtype=dtype, device="cuda")


class Module:
    """The machine code of some kernels. `launch` puts one on torch's current stream."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        from cuda.bindings import driver

        torch.cuda.init()
        torch.zeros(1, device="cuda")  # so that there is a context
        self.driver = driver
        parts = 16  # compiled side by side
        sources = {
            str(i): "\n".join(k.source for k in kernels[i::parts])
            for i in range(min(parts, len(kernels)))
        }
        code = nvcc.compile_all(sources, here())
        self.order = tuple(code)
        self.modules = [self.call("cuModuleLoadData", x) for x in code.values()]
        self.functions = {}
        for i, name in enumerate(code):
            for k in kernels[int(name) :: parts]:
                found = self.call("cuModuleGetFunction", self.modules[i], k.name.encode())
                most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self.call("cuFuncSetAttribute", found, most, k.shared)
                self.functions[k.name] = found

    def call(self, name: str, *args: Any) -> Any:
        """Call the driver; what it refuses is an error."""
        code, *out = getattr(self.driver, name)(*args)
        if code != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {code}")
        return out[0] if out else None

    def launch(
        self, kernel: Kernel, tensors: Mapping[str, torch.Tensor], overlap: bool = False
    ) -> None:
        """Launch on torch's stream; with `overlap`, beside the end of the launch before."""
        cu = self.driver
        for a in kernel.args:
            t = tensors[a.name]
            assert t.is_contiguous(), a
            assert t.dtype == DTYPES[a.dtype], a
            assert t.numel() * t.element_size() >= a.bytes, a
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = kernel.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.block
        config.sharedMemBytes = kernel.shared
        config.hStream = cu.CUstream(torch.cuda.current_stream().cuda_stream)
        if overlap and kernel.overlap:
            value = cu.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute = cu.CUlaunchAttribute()
            kinds = cu.CUlaunchAttributeID
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value = value
            config.attrs, config.numAttrs = [attribute], 1
        pointers = tuple(tensors[a.name].data_ptr() for a in kernel.args)
        kinds = (ctypes.c_void_p,) * len(pointers)
        self.call("cuLaunchKernelEx", config, self.functions[kernel.name], (pointers, kinds), 0)
