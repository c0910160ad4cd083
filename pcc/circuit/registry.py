"""The modules that declare ops: text can only be read when all of them are loaded."""

from __future__ import annotations


def load_ops() -> None:
    """Declare every op."""
    import pcc.circuit.ops
    import pcc.circuit.queries
    import pcc.tensor.ops  # noqa: F401
