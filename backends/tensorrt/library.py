"""TensorRT's Python module: whether it is there, and what it says while it works."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass, field
from typing import Any

from pcc.backends.present import MAJOR, MINOR, attributes
from pcc.backends.tensorrt.runtimes import TensorRt, runtime_for
from pcc.errors import PccError

MESSAGES = 1000  # different ones kept of one graph
LOST = f"there are more than {MESSAGES} messages, of which the rest is lost"


def import_module(r: TensorRt) -> Any:
    """Import the module of a runtime, of a version that its description is of."""
    try:
        module = importlib.import_module(r.module)
    except ImportError as e:
        reason = (str(e).splitlines() or [""])[0][:160]
        what = f"{r.module} cannot be imported: {reason}"
        raise PccError("X330", what, hint=f"pip install '{r.package}'") from None
    found = runtime_for(r.module, str(module.__version__))
    if found.name != r.name:
        what = f"asked for TensorRT {r.name}, installed is {module.__version__}"
        raise PccError("X331", what, hint=f"pip install '{r.package}', or --target {found.target}")
    return module


def need_driver(r: TensorRt) -> None:
    """Raise X332 without a driver, before a builder is made: some releases crash the process."""
    if r.offline:
        return
    try:
        code = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        code = -1
    if code:
        why = "there is no NVIDIA driver" if code == -1 else f"the NVIDIA driver fails ({code})"
        hint = "build on the machine with the GPU, or --target tensorrt-rtx, which needs none"
        raise PccError("X332", f"TensorRT {r.name} builds on a GPU: {why}", hint=hint)


def gpu_architecture() -> str:
    """Return the architecture of the first GPU, `sm_90`; call `need_driver` first."""
    found = attributes(MAJOR, MINOR)
    if found is None:
        raise PccError("X332", "the driver shows no GPU", hint="see `nvidia-smi`")
    return f"sm_{found[0]}{found[1]}"


@dataclass
class Messages:
    """Warnings and errors since the last `take`; there is one logger to a process and module.

    A parser may repeat itself for every node: equal messages are kept once.
    """

    said: dict[tuple[str, str], None] = field(default_factory=dict)
    lost: bool = False
    logger: Any = None

    def add(self, severity: str, text: str) -> None:
        """Keep a message, or remember that one was lost."""
        said = severity, text[:400]
        if len(self.said) < MESSAGES or said in self.said:
            self.said[said] = None
        else:
            self.lost = True

    def take(self) -> list[tuple[str, str]]:
        """Return (severity, text) of what was said, and forget it; `LOST` is the last error."""
        out = [*self.said] + [("ERROR", LOST)] * self.lost
        self.said, self.lost = {}, False
        return out


_LOGGERS: dict[str, Messages] = {}


def messages(module: Any) -> Messages:
    """Return the messages of a module. A second logger would be ignored, so there is one."""
    name = module.__name__
    if name not in _LOGGERS:
        kept = Messages()
        least = int(module.ILogger.Severity.WARNING)

        class Collector(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if int(severity) <= least:
                    kept.add(str(severity).rsplit(".", 1)[-1], text)

        kept.logger = Collector()
        _LOGGERS[name] = kept
    return _LOGGERS[name]
