"""Constants of the model of `cost.py`, as benchmarks/gpu/cost_fit.py wrote them."""

from __future__ import annotations

FITTED = {
    "read": 1.071,
    "start": 3.161,
    "apart": 4.356,
    "sums": 1.106,
    "widened": 26.74,
    "block": 1.273,
    "scanned": 22.73,
    "summaries": 5.839,
    "phase": 1.435,
    "barrier": 5.589,
    "generated": 3,
}
# The largest errors of predicted rounds, and of drafts alone, of all rows.
ROUND_ERROR = 0.064
DRAFT_ERROR = 0.077
