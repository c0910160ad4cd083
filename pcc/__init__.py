"""pcc: compile probabilistic circuits to ONNX.

>>> import pcc
>>> artifact = pcc.compile("CHECKPOINT", out="m.pcc")
>>> engine = pcc.load("m.pcc")
>>> engine.run("prefix", x=x, context=context)["log_cond"]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pcc.check import verify
    from pcc.circuit.circuit import Circuit
    from pcc.circuit.text import parse, show
    from pcc.driver import compile
    from pcc.errors import PccError
    from pcc.exchange import refit
    from pcc.frontends import templates
    from pcc.frontends.builder import Builder
    from pcc.runtime.engine import load

# Loaded when first used, so that `import pcc` is fast and needs neither onnx nor torch.
_LAZY = {
    "Builder": "pcc.frontends.builder",
    "Circuit": "pcc.circuit.circuit",
    "PccError": "pcc.errors",
    "compile": "pcc.driver",
    "load": "pcc.runtime.engine",
    "parse": "pcc.circuit.text",
    "refit": "pcc.exchange",
    "show": "pcc.circuit.text",
    "templates": "pcc.frontends.templates",
    "verify": "pcc.check",
}

__all__ = ["Builder", "Circuit", "PccError", "compile", "load", "parse", "refit", "show",
           "templates", "verify"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pcc' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if name == "templates" else getattr(module, name)
    globals()[name] = value
    return value
