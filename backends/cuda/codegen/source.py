"""The text of a kernel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pcc.backends.cuda.codegen.jobs import Job
from pcc.backends.cuda.codegen.program import CTYPES, Memory, Program, literal
from pcc.backends.cuda.codegen.schedule import Schedule
from pcc.backends.cuda.codegen.work import LANES
from pcc.backends.cuda.kernel import READ, Argument
from pcc.ir.array import Array
from pcc.ir.types import HALVES

THREADS = 512  # with at most 128 registers each: every multiprocessor holds such a block


def write(
    program: Program, s: Schedule, args: list[Argument], pointers: list[Memory], grid: int
) -> str:
    """Return the source of a kernel: its constants, the function, and how a test on a CPU calls it.

    `pointers` belong to the first of `args`; scratch and the barrier follow.
    """
    names = [*(m.pointer for m in pointers), *(a.name for a in args[len(pointers) :])]
    types = [_pointer(a) for a in args]
    lines = ['#include "generated.cuh"', "", *_constants(program)]
    parameters = ", ".join(f"{t} {n}" for t, n in zip(types, names, strict=True))
    lines.append(f'extern "C" __global__ void __launch_bounds__({THREADS})')
    lines.append(f"{program.name}({parameters}) {{")
    lines.append("  using namespace pcc_generated;")
    lines.append("  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;")
    lines.append("  const int warps = blockDim.x / 32;")
    if grid > 1:
        lines.append("  const int any_warp = warp * gridDim.x + blockIdx.x;")
        lines.append("  const int all_warps = warps * gridDim.x;")
    lines += [f"  {x}" for x in _memory(program, s)]
    lines += [f"  {x}" for x in _phases(s, grid)]
    lines += ["}", "", *_thunk(program.name, types)]
    return "\n".join(lines)


def _pointer(a: Argument) -> str:
    kind = {**CTYPES, "u8": "unsigned char", "u32": "unsigned"}[a.dtype]
    constant = a.name.startswith("sha256-")
    return f"{'const ' if a.role == READ else ''}{kind}*{' __restrict__' if constant else ''}"


def _constants(program: Program) -> Iterator[str]:
    for name, a in program.arrays:
        kind = CTYPES[a.dtype]
        yield f"static __device__ const {kind} {name}[] = {{{_numbers(a)}}};"
    for values, name in program.indices.items():
        yield f"static __device__ const int {name}[] = {{{', '.join(map(str, values))}}};"


def _numbers(a: Array) -> str:
    flat = a.value.reshape(-1)
    if a.dtype in HALVES:
        flat = flat.view(np.uint16)
    elif a.dtype == "bool":
        flat = flat.astype(np.int64)
    return ", ".join(literal(x) for x in flat)


def _memory(program: Program, s: Schedule) -> Iterator[str]:
    if s.shared:
        yield f"__shared__ __align__(16) unsigned char shared[{s.shared}];"
    seen = set()
    for storage in program.stored.values():
        m = storage.memory
        if m.place == "arg" or m.pointer in seen or m.pointer not in s.used:
            continue
        seen.add(m.pointer)
        kind = CTYPES[m.dtype]
        yield f"{kind}* const {m.pointer} = ({kind}*)({m.place} + {m.offset});"


def _phases(s: Schedule, grid: int) -> Iterator[str]:
    """Phases in order, runs of cheap ones in block 0."""
    rounds, p = 0, 0
    while p < len(s.phases):
        if p:
            rounds += 1
            yield f"grid_barrier(barrier, {rounds});" if grid > 1 else "__syncthreads();"
        wide = s.wide[p] and grid > 1
        end = p + 1
        while not wide and end < len(s.phases) and not (s.wide[end] and grid > 1):
            end += 1
        if not wide and grid > 1:
            yield "if (blockIdx.x == 0) {"
        for q in range(p, end):
            if q > p:
                yield "__syncthreads();"
            yield f"// phase {q}{' in all blocks' if wide else ''}"
            yield from _jobs(s.phases[q], wide=wide)
        if not wide and grid > 1:
            yield "}"
        p = end
    if rounds and grid > 1:
        yield "grid_leave(barrier);"


def _jobs(jobs: list[Job], *, wide: bool) -> Iterator[str]:
    own, count = ("any_warp", "all_warps") if wide else ("warp", "warps")
    taken = 0
    for j in jobs:
        yield f"// {j.node.name} : {j.node.type}"
        yield (f"for (int u0 = turn({own}, {count}, {taken}); u0 < {j.warps}; u0 += {count}) {{")
        if j.lanes:
            yield from (f"  {x}" for x in j.lines)
        else:
            yield f"  const int e0 = u0 * {LANES} + lane;"
            yield f"  if (e0 < {j.units}) {{"
            yield from (f"    {x}" for x in j.lines)
            yield "  }"
        yield "}"
        taken += j.warps


def _thunk(name: str, types: list[str]) -> Iterator[str]:
    yield "#ifdef PCC_HOST"
    yield f'extern "C" bool {name}_host(void** a, unsigned grid, unsigned block, unsigned seed) {{'
    bare = [t.replace(" __restrict__", "") for t in types]
    call = ", ".join(f"({t})a[{i}]" for i, t in enumerate(bare))
    yield f"  return pcc_host::run(grid, block, seed, [=] {{ {name}({call}); }});"
    yield "}"
    yield "#endif"
    yield ""
