"""A group of Tensor IR nodes as one CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pcc.backends.cuda.codegen.program import Memory, Program, Storage, dense
from pcc.backends.cuda.codegen.schedule import Schedule, Scheduler
from pcc.backends.cuda.codegen.source import THREADS, write
from pcc.backends.cuda.codegen.tables import INLINE
from pcc.backends.cuda.fitted import FITTED
from pcc.backends.cuda.gpu import TUNED, Gpu
from pcc.backends.cuda.kernel import READ, SCRATCH, UPDATE, WRITE, Argument, Kernel
from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.tensor import eva, nn


@dataclass(frozen=True)
class Generated(Kernel):
    """A kernel with its constants: `args` are inputs, outputs, `constants`, scratch, a barrier.

    Outputs in `in_place` have no argument: they are the caches that they are written into.
    `phases` are steps one after another, `barriers` waits of all blocks for each other.
    """

    constants: tuple[Array, ...] = ()
    phases: int = 0
    barriers: int = 0

    @property
    def estimate(self) -> float:
        """About how many microseconds the kernel takes beyond its bytes, as `cost.py` has it."""
        spent = FITTED["barrier"] * self.barriers + FITTED["phase"] * self.phases
        return FITTED["generated"] + spent


def generate(
    name: str,
    nodes: Sequence[Op],
    inputs: Sequence[Op],
    outputs: Sequence[Op],
    batch: int,
    *,
    in_place: Sequence[Op] = (),
    gpu: Gpu = TUNED,
) -> Generated:
    """Return a kernel that computes `outputs` from `inputs` for `batch` rows.

    `nodes` are what lies between (constants need not be among them). Arguments in order: the
    inputs; the outputs, dense, but those of `in_place`; constants too large for the source
    (`constants`); `scratch`; and where blocks wait for each other `barrier u32[2]`, zero. Values
    with a batch axis have it first, of size `batch`, others have none.
    `in_place`: writes of rows whose cache is an input and whose result is that same buffer.
    Blocks that wait for each other must all be there at once: there are no more than `gpu` has
    multiprocessors. Errors: E182-E188.
    """
    program = Program(name, batch, in_place=frozenset(in_place))
    _unmixed(inputs, outputs, nodes, program)
    reads = [program.store(n, _argument(program, n)).memory for n in inputs]
    for n in in_place:
        program.stored[n] = program.stored[n.args[0]]
    writes, copies, made = _outputs(program, inputs, outputs)
    schedule = Scheduler(program, inputs).run(made, copies)
    names = [f"in{i}" for i in range(len(inputs))]
    updated = {n.args[0] for n in in_place}
    args = [
        _described(x, m, program, UPDATE if n in updated else READ)
        for x, n, m in zip(names, inputs, reads, strict=True)
    ]
    args += [_described(f"out{i}", m, program, WRITE) for i, m in writes]
    args += [
        Argument(f"constant{i}", READ, a.dtype, a.shape) for i, a in enumerate(program.weights)
    ]
    pointers = [*reads, *(m for _, m in writes), *program.weights.values()]
    return _kernel(program, schedule, args, pointers, gpu.processors)


def _kernel(
    program: Program, s: Schedule, args: list[Argument], pointers: list[Memory], blocks: int
) -> Generated:
    if s.scratch:
        args.append(Argument("scratch", SCRATCH, "u8", (s.scratch,)))
    grid = _grid(s, blocks)
    if s.barriers and grid > 1:
        args.append(Argument("barrier", SCRATCH, "u32", (2,), zero=True))
    source = write(program, s, args, pointers, grid)
    return Generated(
        program.name, source, (grid, 1, 1), (THREADS, 1, 1), 0, s.barriers > 0 and grid > 1,
        tuple(args), constants=tuple(program.weights), phases=len(s.phases),
        barriers=s.barriers if grid > 1 else 0,
    )  # fmt: skip


def _grid(s: Schedule, blocks: int) -> int:
    """Return how many blocks have something to do in the widest phase."""
    widest = [sum(j.warps for j in p) for p, w in zip(s.phases, s.wide, strict=True) if w]
    return max(1, min(blocks, -(-max(widest, default=1) * 32 // THREADS)))


def _argument(program: Program, n: Op) -> Memory:
    return program.memory(tensor(n).dtype, program.size(n), "arg")


def _outputs(
    program: Program, inputs: Sequence[Op], outputs: Sequence[Op]
) -> tuple[list[tuple[int, Memory]], list[tuple[Op, Storage]], list[Op]]:
    """Give each output its argument.

    A value that is there already is copied, and so is what its readers can compute on their own:
    they need not wait for it.
    """
    writes, copies, made = [], [], []
    for i, n in enumerate(outputs):
        if n in program.in_place:
            made.append(n)
            continue
        memory = _argument(program, n)
        writes.append((i, memory))
        if n in program.stored or not n.args or type(n) in INLINE:
            copies.append((n, Storage(memory, dense(program.shape(n)))))
        else:
            program.store(n, memory)
            made.append(n)
    return writes, copies, made


def _described(name: str, m: Memory, program: Program, role: str) -> Argument:
    return Argument(name, role, m.dtype, (m.size,))


def _unmixed(
    inputs: Sequence[Op], outputs: Sequence[Op], nodes: Sequence[Op], program: Program
) -> None:
    """Refuse writes in place of what is no input, or is read by others as it was."""
    for n in program.in_place:
        if not isinstance(n, nn.CacheWrite | eva.RingWrite) or n.args[0] not in inputs:
            raise PccError("E186", f"'{n.name}' cannot write into its operand", at=n.loc)
        readers = [x for x in (*nodes, *outputs) if n.args[0] in x.args and x is not n]
        if readers or n.args[0] in outputs:
            what = f"'{n.name}' overwrites what '{readers[0].name if readers else 'output'}' reads"
            raise PccError("E186", what, at=n.loc, hint="write into a buffer of its own")
