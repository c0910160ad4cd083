"""How tokens are chosen: greedy, or sampled with truncations of the verifier and of the draft."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcc.errors import PccError
from pcc.runtime.philox import split_seed


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_k 0 and top_p 1 are off. Draft options never change the law."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    draft_temperature: float = 1.0
    draft_top_p: float = 1.0

    def __post_init__(self) -> None:
        split_seed(self.seed)  # refuses what is no seed, for greedy sessions too
        for name in ("temperature", "draft_temperature"):
            v = getattr(self, name)
            low = 0.0 if name == "temperature" else 1e-3
            if not (isinstance(v, int | float) and math.isfinite(v) and low <= v <= 100):
                raise PccError("S102", f"{name}={v!r}", hint=f"a number in {low:g} .. 100")
        for name in ("top_p", "draft_top_p"):
            v = getattr(self, name)
            if not (isinstance(v, int | float) and 0 <= v <= 1):
                raise PccError("S102", f"{name}={v!r}", hint="a number in 0 .. 1")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise PccError("S102", f"top_k={self.top_k!r}", hint="0 (off) or a positive integer")
        if self.temperature == 0:
            object.__setattr__(self, "greedy", True)
        elif self.temperature < 1e-3:
            raise PccError("S102", f"temperature={self.temperature!r}", hint="0, or at least 0.001")

    def inputs(self) -> dict[str, float | int]:
        """Return the graph inputs that are the same in every call and row."""
        return {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p,
            "draft_temperature": self.draft_temperature, "draft_top_p": self.draft_top_p,
        }  # fmt: skip
