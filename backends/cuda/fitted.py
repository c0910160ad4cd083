"""Constants of the model of `cost.py`, as benchmarks/gpu/cost_fit.py wrote them."""

from __future__ import annotations

FITTED = {
    "read": 1.052,
    "start": 1.882,
    "apart": 2.743,
    "staged": 0.06495,
    "normed": 0.2243,
    "sums": 1.687,
    "multiplied": 0.05226,
    "widened": 0.3622,
    "block": 1.317,
    "block_rate": 32.77,
    "sm_rate": 44.89,
    "summaries": 1.624,
    "phase": 1.44,
    "barrier": 2.116,
    "gathered": 0.5305,
    "generated": 3,
}
# The largest errors of rounds and one-token passes, and of drafts, of current rows.
ROUND_ERROR = 0.100
DRAFT_ERROR = 0.136
