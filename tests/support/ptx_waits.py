"""What a kernel in PTX touches before it waits for the launches before it."""

from __future__ import annotations

import re

REGISTER = re.compile(r"%[a-z]+\d+")
MEMORY = ("ld.", "st.", "cp.", "atom.", "red.")


class Code:
    """The instructions of a kernel, and which parameters a register was computed from.

    What is loaded from memory is a number of its own.
    """

    def __init__(self, text: str) -> None:
        lines = (re.sub(r"//.*", "", x).strip() for x in text.splitlines())
        self.lines = [x for x in lines if x and x[0] not in ".{}"]
        assert not any(re.match(r"(@\S+\s+)?(call|brx)", x) for x in self.lines)
        self.labels = {x[:-1]: i for i, x in enumerate(self.lines) if x.endswith(":")}
        self.of: dict[str, set[int]] = {}
        while any([self._spreads(x) for x in self.lines]):
            pass

    def _spreads(self, line: str) -> bool:
        op, _, rest = re.sub(r"^@\S+\s+", "", line).partition("\t")
        target, _, source = rest.partition(",")
        new = set[int]()
        if op.startswith("ld.param"):
            new = {int(x) for x in re.findall(r"_param_(\d+)\]", source)}
        elif not op.startswith(MEMORY):
            new = new.union(*(self.of.get(r, ()) for r in REGISTER.findall(source)))
        grown = False
        for r in REGISTER.findall(target):
            known = self.of.setdefault(r, set())
            grown |= not new <= known
            known |= new
        return grown

    def early(self) -> set[int]:
        """Return the parameters whose memory is touched on some path that has met no wait."""
        seen, found, todo = set[int](), set[int](), [0]
        while todo:
            i = todo.pop()
            line = self.lines[i]
            if i in seen or "griddepcontrol.wait" in line:
                continue
            seen.add(i)
            for address in re.findall(r"\[([^\]]*)\]", line):
                found = found.union(*(self.of.get(r, ()) for r in REGISTER.findall(address)))
            jump = re.search(r"\bbra(?:\.uni)?\s+(\S+);", line)
            if jump:
                todo.append(self.labels[jump[1]])
            ends = line.startswith("ret") or (jump and not line.startswith("@"))
            if not ends:
                todo.append(i + 1)
        return found


def kernels(ptx: str) -> dict[str, Code]:
    """Return the kernels of a file by name."""
    entries = ptx.split(".visible .entry ")[1:]
    return {x.partition("(")[0]: Code(x.partition("{")[2]) for x in entries}
