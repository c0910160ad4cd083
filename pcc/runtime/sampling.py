"""How tokens are chosen: greedy, or sampled with truncations of the verifier and of the draft."""

from __future__ import annotations

from dataclasses import dataclass

from pcc.errors import PccError
from pcc.knobs import MAX_TOKENS
from pcc.runtime.arguments import flag, integer, number
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
        values = {
            "seed": int(self.seed),
            "temperature": number("temperature", self.temperature, 0.0, 100.0),
            "top_p": number("top_p", self.top_p, 0.0, 1.0),
            # No vocabulary is larger, so that a larger number can only be a mistake.
            "top_k": integer("top_k", self.top_k, 0, MAX_TOKENS, code="S102"),
            "greedy": flag("greedy", self.greedy, code="S102"),
            "draft_temperature": number("draft_temperature", self.draft_temperature, 1e-3, 100.0),
            "draft_top_p": number("draft_top_p", self.draft_top_p, 0.0, 1.0),
        }
        if values["temperature"] == 0:
            values["greedy"] = True
        elif values["temperature"] < 1e-3:
            raise PccError("S102", f"temperature={self.temperature!r}", hint="0, or at least 0.001")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def inputs(self) -> dict[str, float | int]:
        """Return the graph inputs that are the same in every call and row."""
        return {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p,
            "draft_temperature": self.draft_temperature, "draft_top_p": self.draft_top_p,
        }  # fmt: skip
