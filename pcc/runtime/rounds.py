"""Prefill chunks and speculative rounds of B rows over one set of state buffers.

One call of the `step` graph is one round: it verifies the window, commits, and drafts the next
window (docs/generation.md). Between calls the host copies the next window and its q, and fills the
uniforms; nothing else crosses. Where that happens, on the host or on a device, the `Place` knows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.errors import PccError
from pcc.runtime.buffers import Values, bytes_bound
from pcc.runtime.philox import Uniforms
from pcc.runtime.runner import Calls
from pcc.runtime.sampling import Sampling
from pcc.runtime.statistics import Statistics

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine


class Rounds:
    """The state of B sequences: lengths, windows, caches. Rows do not influence each other."""

    def __init__(self, engine: Engine, sampling: Sampling, streams: Sequence[int]) -> None:
        spec = engine.generation()
        self.engine, self.sampling, self.spec = engine, sampling, spec
        self.batch, self.n, self.chunk = len(streams), int(spec["n"]), int(spec["chunk"])
        self.max_seq, self.buckets = int(spec["max_seq"]), spec["buckets"]
        greedy = sampling.greedy
        self.step_name = "step_greedy" if greedy else "step"
        self.prefill_name = "prefill_greedy" if greedy else "prefill"
        self.calls: dict[str, Calls] = {}
        self.uniforms = {
            q: Uniforms(sampling.seed, spec["random"][q], streams)
            for q in (self.step_name, self.prefill_name)
            if q in spec["random"]
        }
        self.place = engine.runner.place(spec["states"], self.batch)
        self.states = self.place.states
        self.bucket = -1
        self.length = np.zeros(self.batch, np.int64)
        self.active = np.ones(self.batch, bool)
        self.first_log_probs = np.full(self.batch, np.nan)  # of each row's carry after its prompt
        self.statistics = Statistics(self.n, self.batch)

    def call(self, query: str) -> Calls:
        """Return a graph bound to this session's buffers."""
        if query not in self.calls:
            if query == self.step_name:
                made = self.place.round(query, self.uniforms.get(query))
            else:
                made = self.place.call(query)
            for name, value in self.sampling.inputs().items():
                if name in made.inputs:
                    made[name][:] = value
            if self.bucket >= 0:
                made.attach(self.states)
            self.calls[query] = made
        return self.calls[query]

    def reserve(self, positions: int) -> None:
        """Make room for calls that write up to `positions` rows."""
        need = next((i for i, b in enumerate(self.buckets) if b["rows"] >= positions), None)
        if need is None:
            raise PccError(
                "S120",
                f"{positions} positions do not fit the buffer of {self.buckets[-1]['rows']}",
                hint=f"the engine was compiled with max_seq={self.max_seq}",
            )
        if need > self.bucket:
            self.bucket = need
            self.place.quiet()
            self.states.resize(self.buckets[need]["states"])
            self.states.rows = int(self.buckets[need]["rows"])
            for c in self.calls.values():
                c.attach(self.states)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Values:
        """Process each row's tokens after what it already holds; return the carries `[B]`.

        A row without tokens keeps its state; its carry is -1.
        """
        longest = max(map(len, prompts), default=0)
        self.reserve(int(self.length.max(initial=0)) + longest + max(self.n, self.chunk))
        c, carry = self.call(self.prefill_name), np.full(self.batch, -1, np.int64)
        window, q = self._drafts()
        for start in range(0, longest, self.chunk):
            pieces = [p[start : start + self.chunk] for p in prompts]
            c["input_ids"][:] = 0
            for row, piece in enumerate(pieces):
                c["input_ids"][row, : len(piece)] = piece
                c["valid"][row] = len(piece)
            c["length"][:] = self.length
            if "u" in c.inputs:
                self.uniforms[self.prefill_name].fill(self.length, c["u"])
            began = time.perf_counter()
            c.run()
            spent = time.perf_counter() - began
            last = np.array([0 < len(p) - start <= self.chunk for p in prompts])
            self._check(c, c["emitted"][:, 0], last)
            self._plausible_prefill(c, last)
            self.states.settle()
            self.statistics.prefill(sum(map(len, pieces)), spent)
            on = c["valid"] > 0
            self.length[on] = c["next_length"][on]
            window[on], carry[on] = c["next_window"][on], c["emitted"][on, 0]
            if q is not None:
                q[on] = c["next_draft_q"][on]
            if "log_probs" in c.outputs:
                self.first_log_probs[on] = c["log_probs"][on, 0]
        return carry

    def step(self) -> tuple[Values, Values]:
        """Run one round; return `n_emit [B]` and `emitted [B, n]` (-1 beyond `n_emit`).

        Raises before anything is committed: a round that fails leaves the sequences as they were.
        """
        # A row whose last round passed the end is over; its idle pass must not need more rows.
        within = np.minimum(self.length, self.max_seq)
        self.reserve(int(within.max()) + self.n)
        c = self.call(self.step_name)
        c["length"][:] = within
        c["active"][:] = self.active
        if "u" in c.inputs:
            self.uniforms[self.step_name].fill(within, c["u"])
        began = time.perf_counter()
        c.run()
        spent = time.perf_counter() - began
        self._check(c, c["emitted"][:, 0], self.active)
        self._plausible_round(c)
        self.states.settle()
        count, emitted = c["n_emit"].copy(), c["emitted"].copy()
        self.length += count
        c["window"][:] = c["next_window"]
        if "draft_q" in c.inputs:
            c["draft_q"][:] = c["next_draft_q"]
        self.statistics.round(count, self.active, spent)
        return count, emitted

    def _drafts(self) -> tuple[Values, Values | None]:
        c = self.call(self.step_name)
        return c["window"], c["draft_q"] if "draft_q" in c.inputs else None

    def _check(self, c: Calls, tokens: Values, rows: Values) -> None:
        """Refuse to go on from values that are not numbers, and say where they come from."""
        bad = bool((tokens[rows] < 0).any())
        if "margin" in c.outputs:
            bad = bad or bool(np.isnan(c["margin"][rows]).any())
        if "next_draft_q" in c.outputs:
            bad = bad or not np.isfinite(c["next_draft_q"][rows]).all()
        if bad:
            from pcc.runtime.diagnosis import first_bad_layer

            where = first_bad_layer(self, c)
            raise PccError(
                "S130", f"the model computes values that are not numbers: {where}",
                hint="check the weights with `pcc verify`",
            )  # fmt: skip

    def _plausible_round(self, c: Calls) -> None:
        """Refuse counts and tokens that no round gives: loops rely on them, and so do indices.

        1 <= n_emit <= n for active rows, else 0; emitted[:n_emit] in 0..V-1, then -1.
        """
        count, emitted, vocab = c["n_emit"], c["emitted"], int(self.spec["vocab"])
        on = self.active
        self._need(((count >= on) & (count <= self.n * on)).all(), "the number of tokens")
        told = np.arange(self.n) < count[:, None]
        ids = (emitted >= 0) & (emitted < vocab)
        self._need(np.where(told, ids, emitted == -1).all(), "a token")
        window = c["next_window"][on]
        self._need(((window >= 0) & (window < vocab)).all(), "a token of the next window")

    def _plausible_prefill(self, c: Calls, last: Values) -> None:
        """Refuse lengths and tokens that no chunk of a prompt gives."""
        vocab, on = int(self.spec["vocab"]), c["valid"] > 0
        same = c["next_length"][on] == (c["length"] + c["valid"])[on]
        self._need(same.all(), "the next length")
        for ids in (c["emitted"][last], c["next_window"][last]):
            self._need(((ids >= 0) & (ids < vocab)).all(), "a token")

    def _need(self, ok: Any, what: str) -> None:
        if not ok:
            raise PccError(
                "S131", f"the graph gives {what} that no model gives",
                hint="the bundle is damaged, or another program's: compile it again",
            )  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """Return what a saved session holds: lengths, window, q, states up to their sizes."""
        window, q = self._drafts()
        out: dict[str, Any] = {"length": self.length, "active": self.active, "window": window}
        if q is not None:
            out["draft_q"] = q
        self.place.quiet()
        return out | {f"past.{k}": self.states.read(k) for k in self.states.past}

    def restore(self, arrays: Mapping[str, Values], bucket: int) -> None:
        """Take the place of a session with buffers of this size, whose arrays are checked."""
        self.reserve(int(self.buckets[bucket]["rows"]))
        self.place.quiet()
        window, q = self._drafts()
        self.length[:], self.active[:] = arrays["length"], arrays["active"]
        window[:] = arrays["window"]
        if q is not None:
            q[:] = arrays["draft_q"]
        for name in self.states.past:
            self.states.write(name, arrays[f"past.{name}"])


def memory_of(engine: Engine, rows: int, tokens: int, *, greedy: bool) -> int:
    """Return the bytes of states and bound inputs and outputs for `rows` sequences of `tokens`."""
    spec = engine.generation()
    need = min(tokens, int(spec["max_seq"])) + max(int(spec["n"]), int(spec["chunk"]))
    fits = (b for b in spec["buckets"] if b["rows"] >= need)
    bucket = next(fits, spec["buckets"][-1])
    total = engine.runner.place(spec["states"], rows).states.bytes_for(bucket["states"])
    for query in ("step_greedy", "prefill_greedy") if greedy else ("step", "prefill"):
        total += bytes_bound(engine.queries[query], rows)
    return total
