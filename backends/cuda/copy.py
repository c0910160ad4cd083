"""A copy of an array, for the rare value that is updated in place and read afterwards."""

from __future__ import annotations

from pcc.backends.cuda.kernel import READ, WRITE, Argument, Kernel

THREADS = 256


def copy(name: str, dtype: str, size: int) -> Kernel:
    """y_i = x_i for `size` elements: arguments `x`, `y`."""
    kinds = {"f32": "float", "i64": "long long", "bool": "bool", "u8": "unsigned char"}
    kind = kinds.get(dtype, "unsigned short")
    source = (
        f'extern "C" __global__ void {name}(const {kind}* x, {kind}* y) {{\n'
        f"  for (long long i = blockIdx.x * {THREADS}ll + threadIdx.x; i < {size}ll;\n"
        f"       i += gridDim.x * {THREADS}ll) y[i] = x[i];\n}}\n"
    )
    blocks = max(1, min(1024, -(-size // THREADS)))
    args = (Argument("x", READ, dtype, (size,)), Argument("y", WRITE, dtype, (size,)))
    return Kernel(name, source, (blocks, 1, 1), (THREADS, 1, 1), 0, False, args)
