"""Sessions: text generation with draft and verifier in one graph per round.

The bytes are the verifier's own: greedy ones equal plain autoregressive decoding, sampled ones
follow the verifier's law exactly (docs/generation.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcc.errors import PccError
from pcc.runtime.arguments import TEXT, flag, id_lists, integer, texts, token_ids
from pcc.runtime.rounds import Rounds, memory_of
from pcc.runtime.rows import Goal, Row
from pcc.runtime.sampling import Sampling
from pcc.runtime.statistics import Statistics
from pcc.runtime.vocabulary import Vocabulary, cut_by, whole_characters

if TYPE_CHECKING:
    from pcc.runtime.engine import Engine

Prompt = bytes | str
LAST_STREAM = (1 << 32) - 1  # a word of the counter


@dataclass(frozen=True)
class Result:
    """What a call produced for one sequence.

    `bytes` are the new bytes, `ids` all new ids (special ones included), `logprobs` their natural
    log-probabilities under the verifier if they were asked for, `reason` why it ended: "length",
    "stop", "end" (an end id), "full" (the buffer's end) or "cancelled".
    """

    bytes: bytes
    ids: list[int]
    reason: str
    stats: dict[str, Any]
    logprobs: list[float] | None = None

    @property
    def text(self) -> str:
        """The bytes as UTF-8; broken sequences are replaced."""
        return self.bytes.decode("utf-8", "replace")


class Session:
    """One or more sequences on an engine. Several sessions share an engine's weights.

    A prompt starts a new sequence; without one, generation goes on where it stopped, pending
    tokens first, so that two calls give the bytes of one.
    """

    def __init__(self, engine: Engine, *, stream: int = 0, **options: Any) -> None:
        try:
            self.sampling = Sampling(**options)
        except TypeError as e:
            raise PccError("S102", f"unknown option: {e}", hint="see Engine.session") from None
        self.engine = engine
        self.stream_id = integer("stream", stream, 0, LAST_STREAM, code="S102")
        spec = engine.generation()
        self.max_seq = int(spec["max_seq"])
        self.vocabulary = Vocabulary.of(engine.manifest, int(spec["vocab"]))
        self.rounds: Rounds | None = None
        self.rows: list[Row] = []
        self.reasons: list[str] = []  # why the last call ended, for each sequence
        self._stopped = False

    # ------------------------------------------------------------ generating

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        max_new_bytes: int = 256,
        stop: Iterable[Prompt] = (),
        *,
        bos: bool = True,
        keep_stop: bool = False,
        logprobs: bool = False,
    ) -> Any:
        """Return the `Result` of a prompt, or a list of them for a list of prompts."""
        goal, logprobs = self._goal(max_new_bytes, stop, keep_stop), flag("logprobs", logprobs)
        many = not (prompt is None or isinstance(prompt, TEXT))
        self._open(prompt, bos=bos)
        ends = self._drive(goal)
        results = [
            self._result(row, end, logprobs) for row, end in zip(self.rows, ends, strict=True)
        ]
        return results if many or len(results) > 1 else results[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        max_new_bytes: int = 256,
        stop: Iterable[Prompt] = (),
        *,
        bos: bool = True,
        keep_stop: bool = False,
        text: bool = True,
    ) -> Iterator[bytes]:
        """Yield bytes as they are made; with `text` never half a UTF-8 character.

        A character that `max_new_bytes` would cut stays pending, whole. Closing the iterator or
        `cancel()` keeps what was decided: it is pending for the next call.
        """
        goal, text = self._goal(max_new_bytes, stop, keep_stop), flag("text", text)
        several = isinstance(prompt, Iterable) and not isinstance(prompt, TEXT)
        if several or (prompt is None and len(self.rows) > 1):
            raise PccError("S103", "a stream is of one sequence", hint="use generate for a list")
        self._open(prompt, bos=bos)
        return self._chunks(self.rows[0], goal, text)

    def _chunks(self, row: Row, goal: Goal, text: bool) -> Iterator[bytes]:
        row.begin()
        while True:
            if self.rows[0] is not row:
                raise PccError("S108", "the session has another sequence since this stream began")
            end = self._end(row, goal)
            chunk = row.fresh(end[3] if end else None, goal, text=text)
            if end:
                reason, ids, stop, _ = end
                if text and reason in ("length", "cancelled"):
                    whole = whole_characters(chunk)
                    if whole < len(chunk) and self._cuts(row, chunk[whole:], ids, stop):
                        stop -= len(chunk) - whole
                        ids, chunk = row.owner[stop], chunk[:whole]
                row.finish(ids, stop, reason)
                self.reasons = [reason]
                if chunk:
                    yield chunk
                return
            if chunk:
                row.finish(row.owner[row.shown - 1] + 1, row.shown)
                yield chunk
            self._round()

    def generate_ids(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        max_new_tokens: int = 256,
        stop_ids: Iterable[int] = (),
    ) -> Any:
        """Return new model token ids after a prompt of ids, or a list of them for several prompts.

        Nothing is prepended; only `stop_ids` end a sequence before `max_new_tokens`. Without ids
        generation goes on where it stopped. Errors: S104, S106, S110, S121.
        """
        prompts, many = (None, False)
        if ids is not None:
            prompts, many = id_lists("ids", ids, self.vocabulary.size)
        most = integer("max_new_tokens", max_new_tokens)
        ends = frozenset(token_ids("stop_ids", stop_ids, self.vocabulary.size))
        goal = Goal(max_ids=most, stop_ids=ends or frozenset({-1}))
        self._stopped = False
        if prompts is None:
            self._need_rows()
        else:
            self._start(prompts)
        done = self._drive(goal)
        out = [row.ids[row.first_id : end[1]] for row, end in zip(self.rows, done, strict=True)]
        return out if many or len(out) > 1 else out[0]

    def cancel(self) -> None:
        """Stop the running call after its round; what was decided is kept."""
        self._stopped = True

    def memory(self, tokens: int, rows: int = 1) -> int:
        """Return the bytes that `rows` sequences of up to `tokens` tokens take, weights aside.

        Nothing is allocated. Buffers grow in steps: see `generation.buckets` in the manifest.
        """
        most = integer("tokens", tokens)
        count = integer("rows", rows, 1, LAST_STREAM)
        return memory_of(self.engine, count, most, greedy=self.sampling.greedy)

    @property
    def stats(self) -> dict[str, Any]:
        """Statistics of this session's sequences since their prompt."""
        return self.rounds.statistics.summary() if self.rounds else Statistics(1, 1).summary()

    @property
    def pending(self) -> list[bytes]:
        """Bytes of each sequence that are decided and not delivered: the next call begins so.

        After an error or a cancelled call, this is what would otherwise be lost.
        """
        return [r.pending for r in self.rows]

    # ------------------------------------------------------------ positions, files

    @property
    def tokens(self) -> list[list[int]]:
        """All token ids of each sequence: the prompt and what was delivered."""
        return [[*r.prompt, *r.ids[: r.done_ids]] for r in self.rows]

    def rewind_to(self, n: int) -> None:
        """Forget everything after the first `n` tokens of the (single) sequence.

        Caches are rolled back by length where they hold every position; else (rings, recent ids)
        the kept tokens are processed again. The last kept token is always processed alone, so that
        the next one is drawn with the uniforms of length n - 1. Those have only ever decided
        tokens from position n on, and these are forgotten; the uniforms of a chunk that begins
        earlier may have decided tokens that are kept.
        """
        if self.rounds is None or len(self.rows) != 1:
            raise PccError("S105", "there is no single sequence to rewind")
        (row,) = self.rows
        whole = [*row.prompt, *row.ids[: row.done_ids]]
        n = integer("the number of tokens to keep", n, 1, len(whole), code="S105")
        if n == len(whole) and row.done_ids == len(row.ids):
            return
        kept = whole[:n]
        again = Row(self.vocabulary, kept[: len(row.prompt)])
        again.decide(kept[len(row.prompt) :], row.log_probs[: max(0, n - len(row.prompt))])
        again.finish(len(again.ids), len(again.text))
        by_length = all(
            s["rows_axis"] is not None and not s.get("ring") for s in self.rounds.spec["states"]
        )
        self.rounds.length[0] = n - 1 if by_length else 0
        if not by_length:
            self.rounds.prefill([kept[:-1]])  # for the states; what it draws counts nowhere
        carry = self.rounds.prefill([kept[-1:]])
        again.decide([int(carry[0])], self.rounds.first_log_probs.tolist())
        self.rows = [again]

    def save(self, path: str | Path) -> None:
        """Write the session to an `.npz` file, to go on later with the same engine."""
        from pcc.runtime.saved import save

        save(self, Path(path))

    @staticmethod
    def load(engine: Engine, path: str | Path) -> Session:
        """Return the session that a file holds; it goes on exactly where it was."""
        from pcc.runtime.saved import load

        return load(engine, Path(path))

    # ------------------------------------------------------------ inside

    def _goal(self, max_new_bytes: int, stop: Iterable[Prompt], keep_stop: bool) -> Goal:
        most = integer("max_new_bytes", max_new_bytes)
        stops = tuple(texts("stop", stop))
        if any(not s for s in stops):
            raise PccError("S104", "a stop string is empty", hint="leave it out")
        return Goal(most, None, stops, frozenset(), flag("keep_stop", keep_stop))

    def _open(self, prompt: Prompt | Sequence[Prompt] | None, *, bos: bool) -> None:
        self._stopped = False
        if self.vocabulary.byte_offset is None:
            self.vocabulary.encode(b"")  # says what to use instead
        if prompt is None:
            self._need_rows()
            return
        listed, bos = texts("prompt", prompt), flag("bos", bos)
        if not listed:
            raise PccError("S106", "the list of prompts is empty")
        self._start([self.vocabulary.encode(p, bos=bos) for p in listed])

    def _need_rows(self) -> None:
        if not self.rows:
            raise PccError("S106", "there is nothing to go on from", hint="give a prompt")

    def _start(self, prompts: list[list[int]]) -> None:
        for i, p in enumerate(prompts):
            if not p:
                what, hint = f"prompt {i} holds no token", "give it text"
                if self.vocabulary.bos is not None:
                    hint += ", or let the model's BOS stand in front"
                raise PccError("S106", what, hint=hint)
            if len(p) > self.max_seq:
                raise PccError(
                    "S121",
                    f"prompt {i} has {len(p)} tokens, the engine holds {self.max_seq}",
                    hint="shorten it, or compile with a larger --max-seq",
                )
        streams = streams_of(self.stream_id, len(prompts))
        rounds = self._rounds(streams)
        began = time.perf_counter()
        carry = rounds.prefill(prompts)
        rounds.statistics.total_seconds += time.perf_counter() - began
        rows = [Row(self.vocabulary, list(p)) for p in prompts]
        for row, token, log in zip(rows, carry, rounds.first_log_probs, strict=True):
            row.decide([int(token)], [log])
        self.rounds, self.rows = rounds, rows  # a prompt that fails leaves what was there

    def _rounds(self, streams: Sequence[int]) -> Rounds:
        """Return fresh rounds; a session that tries other uniforms replaces it."""
        return Rounds(self.engine, self.sampling, streams)

    def _end(self, row: Row, goal: Goal) -> tuple[str, int, int, int] | None:
        end = row.end(goal, self.max_seq)
        if end is None and self._stopped:
            return "cancelled", len(row.ids), len(row.text), len(row.text)
        return end

    def _cuts(self, row: Row, tail: bytes, ids: int, stop: int) -> bool:
        """Return whether the bytes after `stop` go on with the character that `tail` begins.

        Where they are not decided yet, rounds are run: what is left out must not depend on how
        many tokens the last round happened to decide.
        """
        ends = set(self.vocabulary.eos)
        while True:
            following = bytes(row.text[stop : stop + 3])
            known = whole_characters(tail + following) > 0 or ends & set(row.ids[ids:])
            if known or self._stopped or len(row.ids) >= self.max_seq - len(row.prompt):
                return cut_by(tail, following)
            self._round()

    def _drive(self, goal: Goal) -> list[tuple[str, int, int, int]]:
        assert self.rounds is not None
        for row in self.rows:
            row.begin()
        ends: list[tuple[str, int, int, int] | None] = [None] * len(self.rows)
        while True:
            for i, row in enumerate(self.rows):
                if ends[i] is None:
                    ends[i] = self._end(row, goal)
                    self.rounds.active[i] = ends[i] is None
            if not self.rounds.active.any():
                break
            self._round()
        out = [e for e in ends if e is not None]
        for row, (reason, ids, stop, _) in zip(self.rows, out, strict=True):
            row.finish(ids, stop, reason)
        self.reasons = [e[0] for e in out]
        self.rounds.active[:] = True
        return out

    def _round(self) -> None:
        """One call of the step graph for every active row."""
        assert self.rounds is not None
        began = time.perf_counter()
        count, emitted = self.rounds.step()
        c = self.rounds.call(self.rounds.step_name)
        logs = c["log_probs"] if "log_probs" in c.outputs else None
        for i, row in enumerate(self.rows):
            if self.rounds.active[i]:
                k = int(count[i])
                new = [float(v) for v in logs[i, :k]] if logs is not None else [float("nan")] * k
                row.decide(emitted[i, :k].tolist(), new)
        spent = time.perf_counter() - began
        self.rounds.statistics.round_seconds += spent
        self.rounds.statistics.total_seconds += spent

    def _result(self, row: Row, end: tuple[str, int, int, int], logprobs: bool) -> Result:
        reason, ids, _, shown = end
        logs = row.log_probs[row.first_id : ids] if logprobs else None
        if logs is not None and np.isnan(logs).any():
            raise PccError("S107", "this engine does not compute log-probabilities")
        data = bytes(row.text[row.first_byte : shown])
        return Result(data, row.ids[row.first_id : ids], reason, self.stats, logs)


def streams_of(first: int, count: int) -> list[int]:
    """Return the streams of `count` rows: first, first + 1, …; none may come round to 0."""
    if first + count - 1 > LAST_STREAM:
        what = f"stream {first} and {count} sequences pass the last stream"
        raise PccError("S102", what, hint=f"streams end at {LAST_STREAM}")
    return list(range(first, first + count))
