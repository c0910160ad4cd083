"""What kernels read before they wait for the launches before them.

From sm_90 on a hand-written kernel starts while the launch before it ends, and reads weights and
old keys before it waits. That launch let it start once its own wait was over. So when it reads, all
launches are over but the one right before: what that one writes must not be read so early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcc.backends.cuda.kernel import READ
from pcc.backends.cuda.plan import Buffer
from pcc.errors import PccError

if TYPE_CHECKING:
    from pcc.backends.cuda.builder import Drawn


def check_early(launches: Sequence[Drawn], buffers: Sequence[Buffer], graph: str) -> None:
    """Refuse a launch that reads, before it waits, what the launch right before writes.

    Right before the first launch of a round inputs and states are written. Errors: E191.
    """
    fresh = {i for i, b in enumerate(buffers) if b.kind != "weight"}
    for i, x in enumerate(launches):
        pairs = list(zip(x.args, x.kernel.args, strict=True))
        for at, a in pairs:
            if x.kernel.overlap and a.early and at in fresh:
                where = f", {x.layer}" * bool(x.layer)
                what = (
                    f"launch {i} ({x.op.name}{where}) reads '{a.name}', buffer "
                    f"{buffers[at].name!r}, before it waits for what writes it right before"
                )
                hint = "the engine orders its launches wrongly: please report it"
                raise PccError("E191", what, at=graph, hint=hint)
        fresh = {at for at, a in pairs if a.role != READ}
