"""The model card's tables are those of `metrics.json`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


@pytest.fixture(scope="module")
def card() -> ModuleType:
    spec = importlib.util.spec_from_file_location("card", MODELS / "card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_equal_the_metrics(card: ModuleType) -> None:
    metrics, text = json.loads((MODELS / "metrics.json").read_text()), (MODELS / "README.md")
    assert card.filled(text.read_text(), metrics) == text.read_text()
    metrics["heads"]["ff-n8"]["stepwise_where_texts_do_not_loop"]["ci95"] += 0.01
    assert card.filled(text.read_text(), metrics) != text.read_text()


def test_files_have_the_sizes_of_the_card(card: ModuleType) -> None:
    text = (MODELS / "README.md").read_text()
    metrics = json.loads((MODELS / "metrics.json").read_text())
    sizes = {k: h["file_bytes"] for k, h in metrics["heads"].items()}
    sizes["backbone"] = metrics["backbone"]["file_bytes"]
    for name, size in sizes.items():
        assert sum(p.stat().st_size for p in (MODELS / name).glob("*.safetensors")) == size
        line = next(x for x in text.splitlines() if x.startswith(f"| `{name}/`"))
        assert line.endswith(f"| {size:,} |")


def test_the_order_of_the_circuits(card: ModuleType) -> None:
    """NLL of every circuit is below FF's on true text, by more than its interval."""
    heads = json.loads((MODELS / "metrics.json").read_text())["heads"]
    for name in set(card.NAMES) - {"ff-n8"}:
        for key in (
            "true_text_nll_gain_over_ff",
            "true_text_nll_gain_where_no_shingle_is_known",
            "nll_gain_over_ff",
            "stepwise_gain_over_ff",
        ):
            assert heads[name][key]["mean"] > heads[name][key]["ci95"] > 0
