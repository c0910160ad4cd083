"""Write the tables of the model card from `metrics.json`, between their marks.

python examples/models/card.py    # rewrites README.md; a test compares the two
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = {
    "ff-n8": "FF", "cp-n8": "CP", "hmm-n8": "HMM", "btree-n8": "BTree",
    "btree-n8-lora": "BTree, adapters",
}  # fmt: skip


def with_interval(value: dict[str, float], digits: int = 2) -> str:
    """Return `mean ± half-width`, each rounded once."""
    return f"{value['mean']:.{digits}f} ± {value['ci95']:.{digits}f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def likelihoods(card: dict[str, Any]) -> str:
    """NLL of 8-byte windows, on true text and on the verifier's own."""
    rows = []
    for key, name in NAMES.items():
        h = card["heads"][key]
        base = key == "ff-n8"
        rows.append(
            [
                name,
                with_interval(h["true_text_nll_per_byte"], 3),
                "" if base else with_interval(h["true_text_nll_gain_over_ff"], 3),
                with_interval(h["true_text_nll_where_no_shingle_is_known"], 3),
                "" if base else with_interval(h["true_text_nll_gain_where_no_shingle_is_known"], 3),
                with_interval(h["nll_per_byte"], 3),
                "" if base else with_interval(h["nll_gain_over_ff"], 3),
                with_interval(h["nll_where_no_shingle_is_known"], 3),
            ]
        )
    columns = ["", "true text", "gain", "new prompts", "gain", "own greedy text", "gain"]
    return table([*columns, "new prompts"], rows)


def acceptance(card: dict[str, Any]) -> str:
    """Accepted bytes of 7 beyond the carry, greedy."""
    rows = []
    for key, name in NAMES.items():
        h = card["heads"][key]
        rows.append(
            [
                name,
                with_interval(h["accepted"]["stepwise"]),
                "" if key == "ff-n8" else with_interval(h["stepwise_gain_over_ff"]),
                with_interval(h["accepted"]["max_product"]),
                with_interval(h["stepwise_where_texts_do_not_loop"]),
                with_interval(h["stepwise_where_no_shingle_is_known"]),
            ]
        )
    loops = f"texts that do not loop ({card['texts_that_do_not_loop']})"
    columns = ["", "stepwise", "gain", "max-product", loops]
    return table([*columns, f"new prompts ({card['prompts_without_known_shingles']})"], rows)


PUBLISHED = {"FF": 2.70, "CP": 3.45, "BTree": 3.72, "HMM": 3.94}  # greedy, n 8, r 32, byte-Llama
EVABYTE = {"FF": 6.89, "CP": 6.70, "BTree": 6.71, "HMM": 6.70}


def compared(card: dict[str, Any]) -> str:
    """Bytes of the window of 8, its first byte counted, and the gain over FF in percent."""

    def cell(value: float, base: float) -> str:
        return f"{value:.2f}" + ("" if value == base else f" ({100 * (value / base - 1):+.0f} %)")

    ours = {n: card["heads"][k]["accepted"]["stepwise"]["mean"] + 1 for k, n in NAMES.items()}
    rows = []
    for name in NAMES.values():
        theirs = [cell(t[name], t["FF"]) if name in t else "" for t in (PUBLISHED, EVABYTE)]
        rows.append([name, cell(ours[name], ours["FF"]), *theirs])
    return table(["", "here, r = 8", "byte-Llama-3.2-3B, r = 32", "EvaByte, r = 32"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "likelihoods": likelihoods,
    "acceptance": acceptance,
    "compared": compared,
}


def filled(text: str, card: dict[str, Any]) -> str:
    """Return the model card with its tables made anew."""
    for name, make in TABLES.items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(first)
        _, mark, after = rest.partition(last)
        if not mark:
            raise ValueError(f"README.md has no marks of the table '{name}'")
        text = before + first + make(card) + last + after
    return text


def main() -> int:
    """Rewrite README.md."""
    card = json.loads((HERE / "metrics.json").read_text())
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text(), card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
