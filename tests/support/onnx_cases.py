"""The cases of `pcc.conformance`, for tests that pick their own."""

from __future__ import annotations

from pcc.conformance.cases import Case, feeds, module_of
from pcc.conformance.core_ops import CASES
from pcc.conformance.edge import values

__all__ = ["CASES", "Case", "feeds", "module_of", "values"]
