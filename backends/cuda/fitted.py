"""Constants of the model of `cost.py`, as benchmarks/gpu/cost_fit.py wrote them."""

from __future__ import annotations

FITTED = {
    "read": 1.047,
    "start": 1.852,
    "apart": 2.596,
    "staged": 0.06535,
    "normed": 0.2284,
    "sums": 1.69,
    "multiplied": 0.05216,
    "widened": 0.3633,
    "block": 1.263,
    "block_rate": 32.79,
    "sm_rate": 44.83,
    "summaries": 1.846,
    "phase": 1.424,
    "barrier": 2.145,
    "gathered": 0.5302,
    "generated": 3,
}
# The largest errors of rounds and one-token passes, and of drafts, of current rows.
ROUND_ERROR = 0.098
DRAFT_ERROR = 0.126
