"""The modules that declare ops: text can only be read when all of them are loaded."""

from __future__ import annotations


def load_ops() -> None:
    """Declare every op."""
    import pcc.circuit.ops
    import pcc.circuit.queries
    import pcc.tensor.eva
    import pcc.tensor.ngram
    import pcc.tensor.nn
    import pcc.tensor.ops
    import pcc.tensor.sampling  # noqa: F401
