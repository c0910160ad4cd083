"""What 8-bit weights cost on the shipped models: error of logits, likelihood, acceptance.

    python benchmarks/int8.py            # measures, writes the JSON and docs/precision.md
    python benchmarks/int8.py --table    # only puts the tables of the JSON into the docs

Target onnx in fp32, so that what differs is the weights. Logits and likelihoods are those of true
held-out text: each prompt is read by the graph `verify`, whose features are the contexts of the
head's `loglik` (windows of n bytes, every `STRIDE` bytes). The adapted head's features are no
output of a graph, so it has no likelihood here. Acceptance is of greedy rounds, stepwise drafts,
each bundle on its own text. Means over prompts with 1.96 standard errors; changes are paired.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "examples"):
    sys.path.insert(0, str(place))

import decoding  # noqa: E402

import pcc  # noqa: E402
from benchmarks import markdown  # noqa: E402
from benchmarks.shipped_heads import document, options  # noqa: E402
from benchmarks.timing import environment  # noqa: E402
from pcc.cli.output import say  # noqa: E402
from pcc.ir.quantise import by_columns  # noqa: E402
from pcc.models.load import load_model  # noqa: E402

Values = np.ndarray[Any, Any]
RESULTS = Path(__file__).resolve().parent / "results" / "int8.json"
DOC = ROOT / "docs" / "precision.md"
START, STOP = "<!-- int8: written by benchmarks/int8.py -->\n", "<!-- end int8 -->"
FORMS = {"fp32": None, "int8 head": "head", "int8 verifier": "verifier", "int8 both": "all"}
SAME_VERIFIER = {"fp32": "fp32", "int8 head": "fp32", "int8 verifier": "int8 verifier",
                 "int8 both": "int8 verifier"}  # fmt: skip
STRIDE, FIRST = 4, 64  # of the windows: bytes between two, and before the first
MAX_SEQ = 512


def mean(values: Values) -> dict[str, float]:
    """Return a mean and 1.96 standard errors."""
    error = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"mean": round(float(values.mean()), 4), "ci95": round(error, 4)}


def compiled(head: str, form: str, folder: Path, models: Path) -> Any:
    """Return the engine of a head in one of the forms."""
    queries = ["draft"] if head.endswith("lora") else ["draft", "loglik"]
    made = pcc.compile(
        models / head, verifier=models / decoding.BACKBONE, queries=queries, max_seq=MAX_SEQ,
        int8=FORMS[form], out=folder / f"{head}-{form.replace(' ', '-')}.pcc", validate=False,
    )  # fmt: skip
    return pcc.load(made.path, threads=1)


def read_text(engine: Any, ids: Values) -> tuple[Values, Values]:
    """Return logits [P,T,V] and features [P,T,D] of whole texts `ids [P,T]`."""
    spec, n = engine.queries["verify"], int(engine.generation()["n"])
    count, length = ids.shape
    rows = -(-length // n) * n
    padded = np.zeros((count, rows), np.int64)
    padded[:, :length] = ids
    states = {
        i["name"]: np.zeros([count, *(rows if isinstance(d, str) else d for d in i["shape"][1:])],
                            np.float32)
        for i in spec["inputs"] if i["name"].startswith("past.")
    }  # fmt: skip
    names, parts = [o["name"] for o in spec["outputs"]], []
    for at in range(0, rows, n):
        feed = {"input_ids": padded[:, at : at + n], "length": np.full(count, at), **states}
        got = dict(zip(names, engine.runner.answer("verify", feed, count), strict=True))
        states = {k: got[f"present.{k.removeprefix('past.')}"] for k in states}
        parts.append((np.array(got["logits"]), np.array(got["hidden_states"])))
    logits, hidden = (np.concatenate(x, 1)[:, :length] for x in zip(*parts, strict=True))
    return logits, hidden


def log_softmax(x: Values) -> Values:
    """Return logarithms of probabilities over the last axis, in float64."""
    wide = x.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def bits(logits: Values, ids: Values) -> Values:
    """Return -log2 p of the next byte, mean over each prompt."""
    logs = log_softmax(logits[:, :-1])
    return -np.take_along_axis(logs, ids[:, 1:, None], -1).mean((1, 2)) / np.log(2)


def compared(want: Values, got: Values, ids: Values) -> dict[str, Any]:
    """Return how logits differ: of a usual one, at most, in law, in what is chosen, in bits."""
    spread = want.std(-1, keepdims=True)
    p, q = log_softmax(want), log_softmax(got)
    return {
        "rms_of_spread": float(np.sqrt((((got - want) / spread) ** 2).mean())),
        "max_of_spread": float((np.abs(got - want) / spread).max()),
        "total_variation": mean(0.5 * np.abs(np.exp(p) - np.exp(q)).sum(-1).mean(-1)),
        "same_choice": float((want.argmax(-1) == got.argmax(-1)).mean()),
        "bits_per_byte": mean(bits(got, ids)),
        "change": mean(bits(got, ids) - bits(want, ids)),
    }


def output_matrix(models: Path, hidden: Values) -> Values:
    """Return the logits of features with the output matrix alone in 8 bits."""
    head: Any = load_model(models / decoding.BACKBONE, max_rows=8)
    q, scale = by_columns(head.head.value)
    return (hidden.astype(np.float64) @ (q.value * scale.value.astype(np.float64))).astype("f4")


def likelihood(engine: Any, hidden: Values, ids: Values) -> Values:
    """Return -log q of each prompt's windows, nats per byte."""
    n = int(engine.generation()["n"])
    starts = np.arange(FIRST, ids.shape[1] - n, STRIDE)
    windows = ids[:, starts[:, None] + np.arange(1, n + 1)]
    contexts = hidden[:, starts].reshape(-1, hidden.shape[-1])
    got = engine.run("loglik", x=windows.reshape(-1, n), context=contexts)["log_prob"]
    return -got.reshape(len(ids), -1).mean(-1) / n


def accepted(engine: Any, prompts: Sequence[bytes], count: int) -> Values:
    """Return accepted drafts per round of each prompt."""
    out = []
    for text in prompts:
        stats = engine.session(greedy=True).generate(text, count).stats
        out.append(stats["draft_tokens_accepted"] / stats["rounds"])
    return np.array(out)


def measure(heads: Sequence[str], models: Path, folder: Path, count: int, length: int) -> Any:
    """Return the document."""
    prompts = decoding.prompts(count, models)
    texts: dict[str, tuple[Values, Values]] = {}
    document: dict[str, Any] = {
        "environment": environment(1), "prompts": len(prompts), "bytes": length, "rows": [],
    }  # fmt: skip
    with np.load(models / "heldout.npz", allow_pickle=False) as data:
        rows = data["prompts"].astype(np.int64)
    ids = rows[[(2 * i + 1) * len(rows) // (2 * count) for i in range(count)]]
    for head in heads:
        found: dict[str, dict[str, Values]] = {}
        for form in FORMS:
            say(f"{head}, {form}")
            engine = compiled(head, form, folder, models)
            verifier = SAME_VERIFIER[form]
            if verifier not in texts:
                texts[verifier] = read_text(engine, ids)
            found[form] = {"accepted": accepted(engine, prompts, length)}
            if not head.endswith("lora"):
                found[form]["nll"] = likelihood(engine, texts[verifier][1], ids)
            size = (engine.path / "graphs" / "weights.bin").stat().st_size
            document["rows"].append(_row(head, form, found, size))
    logits, hidden = texts["fp32"]
    document["fp32_bits_per_byte"] = mean(bits(logits, ids))
    document["verifier"] = {
        "layers": compared(logits, texts["int8 verifier"][0], ids),
        "output matrix alone": compared(logits, output_matrix(models, hidden), ids),
    }
    return document


def _row(head: str, form: str, found: Mapping[str, Mapping[str, Values]], size: int) -> Any:
    row: dict[str, Any] = {"head": head, "weights": form, "weight_file_bytes": size}
    for name, values in found[form].items():
        row[name] = mean(values)
        if form != "fp32":
            row[f"{name}_change"] = mean(values - found["fp32"][name])
    return row


def _pm(value: Mapping[str, float] | None, digits: int = 3, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value['mean']:{sign}.{digits}f} ± {value['ci95']:.{digits}f}"


def tables(document: Any) -> str:
    """Return the document as Markdown: what the verifier's logits do, and a row for each bundle."""
    e, base = document["environment"], document["fp32_bits_per_byte"]
    about = (
        f"{document['prompts']} held-out prompts, {document['bytes']} new bytes each; fp32 has "
        f"{_pm(base)} bits per byte. {e['date'][:10]}."
    )
    logits = markdown.table(
        ("8-bit", "error of a logit: rms, largest (of the spread of a row)", "total variation",
         "same choice", "bits per byte, change"),
        ((name, f"{v['rms_of_spread']:.4f}, {v['max_of_spread']:.3f}",
          _pm(v["total_variation"], 4), f"{100 * v['same_choice']:.2f} %",
          _pm(v["change"], 4, "+")) for name, v in document["verifier"].items()),
    )  # fmt: skip
    heads = markdown.table(
        ("head", "weights", "NLL, nats per byte", "change", "accepted per round", "change"),
        ((decoding.TITLES.get(r["head"], r["head"]), r["weights"], _pm(r.get("nll")),
          _pm(r.get("nll_change"), 4, "+"), _pm(r["accepted"], 2),
          _pm(r.get("accepted_change"), 3, "+")) for r in document["rows"]),
    )  # fmt: skip
    return "\n\n".join((about, logits, heads))


def into(text: str, document: Any) -> str:
    """Replace what lies between the markers."""
    return markdown.placed(text, START, STOP, tables(document))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    args = options(__doc__, RESULTS, 64, argv)
    found = document(args, measure)
    print(tables(found))
    if args.json == RESULTS:
        DOC.write_text(into(DOC.read_text("utf-8"), found), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
