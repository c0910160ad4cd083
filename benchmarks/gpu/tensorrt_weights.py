"""Parts of `tensorrt_check.py` about weights: exchanged by refitting, shared by profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
REPEATS, WARM = 100, 10
QUERIES = ("prefix", "conditionals")
QUICK = {"level": 1}  # tactics decide about time, not about results
ROUNDS = ("prefill", "step", "prefill_greedy", "step_greedy")  # what two sessions open


def exchanged(target: str, folder: Path) -> Iterator[Row]:
    """Answers of a refitted bundle beside those of a build with the same weights."""
    import pcc
    from pcc.frontends import templates

    for kind in ("cp", "hmm", "btree"):
        for precision in ("fp32", "fp16"):
            name = f"{kind}-{precision}"
            heads = [getattr(templates, kind)(4, 8, 40, context=64, seed=s) for s in (1, 2)]
            how: dict[str, Any] = {"target": target, "precision": precision, "validate": False,
                                   "queries": list(QUERIES), "progress": print}  # fmt: skip
            paths = [folder / f"{name}-{k}.pcc" for k in ("old", "new", "refit")]
            pcc.compile(heads[0], out=paths[0], engine={**QUICK, "refit": "refit"}, **how)
            pcc.compile(heads[1], out=paths[1], engine=QUICK, **how)
            pcc.refit(paths[0], heads[1], out=paths[2], validate=False)
            old, new, got = (_answers(p) for p in paths)
            for q in QUERIES:
                error = float(np.abs(got[q] - new[q]).max())
                apart = float(np.abs(old[q] - new[q]).max())
                bound = 1e-3 if precision == "fp32" else 0.05
                good = error <= bound < apart
                yield {"suite": "exchanged", "case": name, "what": q, "error": error,
                       "bound": bound, "verdict": "ok" if good else "differs",
                       "note": f"the weights before give other answers by {apart:.3g}"}  # fmt: skip


def _answers(path: Path) -> dict[str, Any]:
    import pcc

    rng, engine = np.random.default_rng(0), pcc.load(path, provider="tensorrt")
    feed: dict[str, Any] = {"x": rng.integers(0, 40, (1, 4)),
                            "context": rng.normal(size=(1, 64)).astype(np.float32)}  # fmt: skip
    return {q: engine.run(q, **feed)["log_cond"].astype(np.float64) for q in QUERIES}


def shared(target: str, folder: Path, clocked: Callable[..., dict[str, float]]) -> Iterator[Row]:
    """Memory and time of rounds with and without profiles: a Llama of 220 MB of weights in fp16."""
    import pcc
    from pcc.conformance import models
    from pcc.frontends import templates

    size = models.Size(1024, 8, 8, 2816, 0.25)
    model = models.llama_folder(folder / "model", noise=size.noise, size=size)
    weights = sum(p.stat().st_size for p in model.glob("*.safetensors")) // 2
    head = templates.hmm(8, 8, 258, context=size.width, seed=1)
    before: Row = {}
    for profiles in (False, True):
        out = folder / f"{profiles}.pcc"
        pcc.compile(
            head, verifier=model, target=target, precision="fp16", out=out, max_seq=512,
            queries=["draft"], validate=False, progress=print,
            engine={"only": ",".join(ROUNDS), "profiles": profiles},
        )  # fmt: skip
        row = _measured(pcc.load(out, provider="tensorrt"), clocked)
        plans = sum(p.stat().st_size for p in out.glob("engines/*/*.plan"))
        row |= {"suite": "shared", "case": f"profiles-{profiles}", "what": "four graphs",
                "weight_bytes": weights, "plan_bytes": plans, "verdict": "ok"}  # fmt: skip
        # Three of four copies of the weights are to be gone.
        saved = before.get("device_bytes", 0) - row["device_bytes"]
        if profiles and saved < 2.5 * weights:
            row |= {"verdict": "differs", "note": f"{saved} bytes saved of {3 * weights}"}
        before = row
        yield row


def _measured(engine: Any, clocked: Callable[..., dict[str, float]]) -> Row:
    """Open the four graphs over buffers of zeros; return the memory they took, and their times."""
    from pcc.runtime.device.arena import size_of
    from pcc.runtime.device.executor import arrays
    from pcc.runtime.device.handles import Memory

    device, stream = engine.runner.device, engine.runner.stream
    device.enter()
    free, _ = device.memory()
    runs = {q: engine.executor(q)[1] for q in ROUNDS}
    taken, row = free - device.memory()[0], dict[str, Any]()
    held: dict[str, Memory] = {}
    for q, run in runs.items():
        for name, io in arrays(engine.queries[q]):
            key = name.replace("present.", "past.") if name[:8] == "present." else f"{q}.{name}"
            if key not in held:
                shape = [1 if d in ("B", "Bc") else d for d in io["shape"]]
                held[key] = Memory(device, size_of(shape, io["dtype"]))
                device.zero(held[key].address, held[key].bytes, stream)
            run.bind(name, held[key].address)
        for _ in range(WARM):
            run.enqueue(stream)
        device.wait(stream)
        graph = device.capture(stream, lambda run=run: run.enqueue(stream))
        row[f"{q}_ms"] = clocked(device, stream, lambda graph=graph: device.launch(graph, stream))
    return {"device_bytes": taken, **row}
