"""byte-Llama: a Llama over bytes that also sees which subword ends at each byte.

x_t = E[id_t] + F[g_t], g_t the longest token of the original subword vocabulary that the ids up to
t end with. The dictionary stands in config.json: keys are lists of id + 1, newest first; values are
rows of F, plus 1. At an id in its second part (compared as id + 1) only the id itself counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from pcc import knobs
from pcc.ir.array import Array
from pcc.ir.core import Op, tensor
from pcc.models.base import StateSpec, constant
from pcc.models.config import Config
from pcc.models.decoder import Decoder, read_decoder
from pcc.models.tensors import Source, Values
from pcc.tensor import nn
from pcc.tensor import ops as t
from pcc.tensor.ngram import NONE, LongestSuffix

RECENT = "recent_ids"


@dataclass(frozen=True)
class Ngrams:
    """Keys `[T,L]` (newest first, -1 beyond their end), their rows of F, ids that stand alone."""

    keys: Values
    rows: Values
    alone: Values

    @property
    def longest(self) -> int:
        """Length L of the longest key."""
        return int(self.keys.shape[1])


@dataclass(frozen=True)
class ByteLlama(Decoder):
    """A decoder that keeps the last L - 1 committed ids beside its keys and values."""

    ngrams: Ngrams | None = None
    expansion: Op | None = None

    def states(self, rows: int) -> tuple[StateSpec, ...]:
        """Keys and values, then the most recent ids."""
        specs = super().states(rows)
        known = self._known.longest - 1
        return (*specs, StateSpec(RECENT, "i64", (known,))) if known else specs

    @property
    def _known(self) -> Ngrams:
        assert self.ngrams is not None
        return self.ngrams

    def embed(self, ids: Op, start: Op, past: Mapping[str, Op]) -> Op:
        """Return E[id] + F[longest token that ends here], f32[N,D]."""
        known, ngrams = self._known.longest - 1, self._known
        x = ids
        if known:
            # Recent ids before the beginning of the text are whatever the state was filled with.
            back = constant(np.arange(known) - known)
            before = t.Less(t.Add(t.Reshape(start, (1,)), back), constant(np.zeros(1, np.int64)))
            none = constant(np.full(1, NONE))
            x = t.Concat((t.Where(before, none, past[RECENT]), ids), 0)
        keys, rows, alone = map(Array.of, (ngrams.keys, ngrams.rows, ngrams.alone))
        assert self.expansion is not None
        word = LongestSuffix(x, keys, rows, alone, 0)
        return t.Add(nn.Embedding(self.embedding, ids), nn.Embedding(self.expansion, word))

    def present(self, ids: Op, past: Mapping[str, Op], count: Op) -> dict[str, Op]:
        """Return the recent ids once `count` of `ids` are committed: L - 1 from `count` on."""
        known = self._known.longest - 1
        if not known:
            return {}
        joined = t.Concat((past[RECENT], ids), 0)
        total = tensor(joined).shape[0]
        table = t.Expand(t.Reshape(joined, (1, 1, total)), joined, (known, 1, total))
        at = t.Add(t.Reshape(count, (1,)), constant(np.arange(known)))
        return {RECENT: t.Reshape(t.Lookup(table, at), (known,))}


# ---------------------------------------------------------------- reading


def read_byte_llama(config: Config, tensors: Source, *, max_rows: int) -> Decoder:
    """Build a byte-Llama; without `expand_input_ids` it is a plain Llama."""
    if not config.flag("expand_input_ids", False):
        return read_decoder(config, tensors, max_rows=max_rows)
    vocab, words = config.size("vocab_size"), config.size("expand_input_ids_vocab_size")
    ngrams = read_ngrams(config, vocab, words)
    name = "model.expand_embed_tokens.weight"
    expansion = constant(tensors.matrix(name, words, config.size("hidden_size")))
    base = read_decoder(config, tensors, max_rows=max_rows)
    same = {f.name: getattr(base, f.name) for f in fields(Decoder)}
    return ByteLlama(**same, ngrams=ngrams, expansion=expansion)


def read_ngrams(config: Config, vocab: int, words: int) -> Ngrams:
    """Read the dictionary of config.json. Errors: M113."""
    name, longest = "expand_input_ids_dict", config.size("expand_input_ids_maxlen")
    if longest > knobs.MAX_NGRAM:
        config.refuse("expand_input_ids_maxlen", f"more than {knobs.MAX_NGRAM}", code="M113")
    found = config.optional(name)
    parts = found if isinstance(found, list) and len(found) == 2 else [None, None]
    if not isinstance(parts[0], dict) or not isinstance(parts[1], list):
        config.refuse(name, "is not a dictionary and a list of ids", code="M113")
    keys, rows = [], []
    for text, row in parts[0].items():
        if not text:
            continue  # the key of no ids: it stands for "nothing found"
        key = _ids(config, text, vocab, longest)
        if key is None:
            continue
        if type(row) is not int or not 1 <= row <= words:
            config.refuse(name, f"{row!r} is not within 1..{words}", code="M113")
        keys.append([*key, *[NONE] * (longest - len(key))])
        rows.append(row - 1)
    if any(type(i) is not int for i in parts[1]):
        config.refuse(name, "the second part holds something else than ids", code="M113")
    alone = sorted({i - 1 for i in parts[1] if 1 <= i <= vocab})
    if not keys or len({*map(tuple, keys)}) < len(keys):
        config.refuse(name, "is empty, or holds a key twice", code="M113")
    integers = (np.array(x, np.int64) for x in (keys, rows, alone))
    return Ngrams(*integers)


def _ids(config: Config, text: str, vocab: int, longest: int) -> list[int] | None:
    """Return the ids of a key, newest first; None if it holds an id that cannot occur."""
    parts = text.split(",")
    plain = all(p.isascii() and p.isdecimal() and len(p) < 10 for p in parts)
    if not plain or len(parts) > longest:
        what = f"the key {text[:40]!r} is not a list of up to {longest} ids"
        config.refuse("expand_input_ids_dict", what, code="M113")
    ids = [int(p) - 1 for p in parts]
    return ids if all(0 <= i < vocab for i in ids) else None
