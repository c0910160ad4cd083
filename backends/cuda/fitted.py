"""Constants of the model of `cost.py`, as benchmarks/gpu/cost_fit.py wrote them."""

from __future__ import annotations

FITTED = {
    "read": 1.088,
    "start": 2.304,
    "apart": 2.519,
    "staged": 0.02375,
    "normed": 0.2609,
    "sums": 1.68,
    "multiplied": 0.04943,
    "widened": 0.4343,
    "code": 0.3021,
    "block": 1.538,
    "block_rate": 33.85,
    "sm_rate": 45.14,
    "summaries": 2.711,
    "phase": 1.419,
    "barrier": 2.15,
    "gathered": 0.5295,
    "generated": 3,
}
# The largest errors of rounds and one-token passes, and of drafts, of current rows.
ROUND_ERROR = 0.109
DRAFT_ERROR = 0.123
