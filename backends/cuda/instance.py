"""From sizes to source: the text that makes one kernel of a template in `kernels/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pcc.backends.cuda.gpu import Gpu
from pcc.backends.cuda.kernel import READ, Argument, Dim, Kernel
from pcc.errors import PccError

TYPES = {"f16": "__half", "bf16": "__nv_bfloat16", "f32": "float"}
POINTERS = {"f32": "float", "i64": "long long", "u32": "unsigned", "u8": "unsigned char", **TYPES}

Trait = bool | int | float | str  # of a type: its name


def instance(
    gpu: Gpu,
    name: str,
    template: str,
    traits: Mapping[str, Trait],
    args: Sequence[Argument],
    grid: Dim,
    threads: int,
    shared: int = 0,
    cluster: int = 1,
) -> Kernel:
    """Return the kernel: its traits as constants of a struct, its pointers as a struct.

    `cluster`: so many neighbours along x share their memory, from sm_90 on; before, no kernel
    waits for the launches before it by itself.
    """
    fields = "\n".join(f"  {_constant(k, v)}" for k, v in traits.items())
    pointers = ", ".join(f"{_pointer(a)} {a.name}" for a in args)
    given = "\n".join(f"  a.{a.name} = {a.name};" for a in args)
    bounds = f"__launch_bounds__({threads}, 1)"
    bounds = f"PCC_CLUSTER({cluster}) {bounds}" if cluster > 1 else bounds
    source = (
        f'#include "{template}.cuh"\n'
        f"struct {name}_traits {{\n{fields}\n}};\n"
        f'extern "C" __global__ void {bounds} {name}({pointers}) {{\n'
        f"  pcc::{template}_args<{name}_traits> a{{}};\n{given}\n"
        f"  pcc::{template}<{name}_traits>(a);\n}}\n"
    )
    block = (threads, 1, 1)
    return Kernel(name, source, grid, block, shared, False, tuple(args), overlap=gpu.overlaps)


def require(ok: bool, name: str) -> None:
    """Refuse sizes or options that no kernel is written for. Errors: E180."""
    if not ok:
        hint = "see the function of pcc.backends.cuda.library for what it takes"
        raise PccError("E180", f"no such kernel for {name!r}: sizes or options", hint=hint)


def _constant(name: str, value: Trait) -> str:
    if isinstance(value, bool):
        return f"static constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"static constexpr int {name} = {value};"
    if isinstance(value, float):
        return f"static constexpr float {name} = {value:.9e}f;"
    return f"using {name} = {value};"


def _pointer(a: Argument) -> str:
    # Not __restrict__: loads declared free of conflicts may be moved before the wait for the
    # launches that write what they read.
    return f"{'const ' if a.role == READ else ''}{POINTERS[a.dtype]}*"
