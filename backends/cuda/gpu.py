"""What a plan has to know about a GPU: for how many multiprocessors, and how much shared memory.

Shared memory is a fact of the architecture (compute capability): the CUDA programming guide's table
of technical specifications. A block may ask for 1 KB less than a multiprocessor has, which the
system takes for each block. Multiprocessors and the rate of a copy are facts of a product; the
table has those of one that is often met, `--gpu ARCH:MULTIPROCESSORS` says another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pcc.backends.present import MAJOR, MINOR, PROCESSORS, attributes
from pcc.errors import PccError

KB = 1 << 10
RESERVED = 1 * KB  # of each block, taken by the system
APART = 2 * KB  # more than half of a multiprocessor's memory by so much, with what is reserved
LEAST_ARCH = 80  # asynchronous copies and the mma shapes of the products
LETTER_ARCH = 90  # from here on nvcc has a form "a" of each: for that GPU alone, with all it can do
OVERLAP_ARCH = 90  # launches that start while those before them end; clusters; the copy engine
MOST_PROCESSORS = 1024  # that anybody may ask for: several times those of the largest GPU


@dataclass(frozen=True)
class Gpu:
    """A GPU that work is divided for.

    `arch` as nvcc names it; `processors`: multiprocessors; `shared`: bytes of shared memory of a
    multiprocessor; `copy_rate`: TB/s that a large copy moves, read and written, for the model of
    `split.py`; `product`: of which the numbers are.
    """

    arch: str
    processors: int
    shared: int
    copy_rate: float
    product: str

    @property
    def number(self) -> int:
        """The compute capability without its dot: 90."""
        return int(re.sub(r"\D", "", self.arch))

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that one block may have, static and dynamic together."""
        return self.shared - RESERVED

    @property
    def alone(self) -> int:
        """Bytes with which no two blocks share a multiprocessor while others are without."""
        return self.shared // 2 + APART

    @property
    def overlaps(self) -> bool:
        """Whether a kernel can wait by itself for the launches before it."""
        return self.number >= OVERLAP_ARCH


def _gpu(arch: str, processors: int, shared_kb: int, copy_rate: float, product: str) -> Gpu:
    return Gpu(arch, processors, shared_kb * KB, copy_rate, product)


GPUS: Mapping[str, Gpu] = {
    g.arch: g
    for g in (
        _gpu("sm_80", 108, 164, 1.5, "A100"),
        _gpu("sm_86", 84, 100, 0.7, "RTX A6000, A40"),
        _gpu("sm_87", 16, 164, 0.18, "Jetson AGX Orin"),
        _gpu("sm_89", 128, 100, 0.8, "RTX 4090; an L40S has 142"),
        _gpu("sm_90", 132, 228, 3.0, "H100 SXM, H200"),
        _gpu("sm_100", 148, 228, 7.0, "B200"),
        _gpu("sm_103", 148, 228, 7.0, "B300"),
        _gpu("sm_110", 20, 228, 0.24, "Jetson Thor"),
        _gpu("sm_120", 170, 100, 1.6, "RTX 5090; an RTX PRO 6000 has 188"),
        _gpu("sm_121", 48, 100, 0.24, "GB10"),
    )
}
TUNED = GPUS["sm_90"]  # what the kernels were measured on, and what is taken where no GPU is


def gpu_of(asked: str | None) -> Gpu:
    """Return the GPU to divide for: as asked, else the one present, else an H100. Errors: E180.

    "sm_90", "90", "sm_90a", or with multiprocessors "sm_89:142". Without them: those of the GPU
    present where it is of that architecture, else those of the table. Machine code runs on GPUs of
    the architecture (and later ones of its generation) only.
    """
    here = present()
    if asked is None:
        return TUNED if here is None else replace(described(here[0]), processors=here[1])
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})(a?)(?::(\d{1,6}))?", asked, re.ASCII)
    if match is None or int(match[1]) < LEAST_ARCH:
        what = f"{asked[:40]!r} is no GPU architecture from sm_{LEAST_ARCH} on"
        hint = "for example sm_80 (A100), sm_90 (H100), or with multiprocessors sm_89:142 (L40S)"
        raise PccError("E180", what, hint=hint)
    known = described(f"sm_{match[1]}")
    if match[2] and known.number < LETTER_ARCH:
        what = f"{asked[:40]!r}: architectures before sm_{LETTER_ARCH} have no letter"
        raise PccError("E180", what, hint=f"--gpu {known.arch}")
    count = known.processors
    if match[3] is not None:
        count = int(match[3])
    elif here is not None and here[0] == known.arch:
        count = here[1]
    if not 1 <= count <= MOST_PROCESSORS:
        what = f"{count} multiprocessors are not 1 to {MOST_PROCESSORS}"
        raise PccError("E180", what, hint=f"the table of docs/cuda.md has {known.processors}")
    return replace(known, arch=known.arch + match[2], processors=count)


def described(arch: str) -> Gpu:
    """Return what is known of an architecture without a letter. Errors: E180."""
    if arch not in GPUS:
        what = f"nothing is known of the multiprocessors of {arch}, for which work is divided"
        raise PccError("E180", what, hint=f"known are {', '.join(GPUS)}")
    return GPUS[arch]


def present() -> tuple[str, int] | None:
    """Return architecture and multiprocessors of the first GPU, if the kernels can run on it."""
    found = attributes(MAJOR, MINOR, PROCESSORS)
    if found is None or 10 * found[0] + found[1] < LEAST_ARCH:
        return None
    return f"sm_{found[0]}{found[1]}", found[2]
