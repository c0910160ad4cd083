"""Train the models of examples/models in a given time: measure the speed, choose steps, train.

    python examples/train/recipe.py backbone --seconds 480     # then greedy continuations
    python examples/train/recipe.py heads --seconds 480
    python examples/train/recipe.py smoke                      # both, a few steps

Prints the exact `pcc train` commands with the steps chosen; these reproduce the run elsewhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pcc.train import config as cfg
from pcc.train.loop import Loop
from pcc.train.tasks import BackboneTask, HeadTask

HERE = Path(__file__).parent
HEADS = ("ff-n8", "cp-n8", "hmm-n8", "btree-n8", "btree-n8-lora")  # what examples/models ships
WARM, TIMED = 15, 40


def say(text: str) -> None:
    """Print a line on stderr."""
    print(f"recipe: {text}", file=sys.stderr, flush=True)


def seconds_per_step(path: Path, overrides: list[str]) -> float:
    """Time a few steps of a run that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        c = cfg.read(path, [*overrides, f"out={folder}", "run.save_every=0"])
        loop = Loop(c, (BackboneTask if c.kind == "backbone" else HeadTask)(c), progress=False)
        for step in range(WARM + TIMED):
            if step == WARM:
                loop._check()
                began = time.perf_counter()
            loop._step(step)
        loop._check()
        return (time.perf_counter() - began) / TIMED


def train(path: Path, overrides: list[str]) -> None:
    """Run one configuration in a process of its own, so that memory is given back."""
    words = " ".join(f"--set {o}" for o in overrides)
    say(f"pcc train {path} {words}")
    command = [sys.executable, "-m", "pcc.train", str(path)]
    for o in overrides:
        command += ["--set", o]
    subprocess.run(command, check=True)


def backbone(seconds: float, forms: list[str], extra: list[str]) -> None:
    """Train the backbone, compiled where that works and is faster, and write its continuations."""
    path, began = HERE / "backbone.yaml", time.perf_counter()
    times: dict[str, float] = {}
    for form in forms:
        try:
            times[form] = seconds_per_step(path, [*extra, f"run.compile={form}"])
        except Exception as e:  # whatever the compiler throws: the plain form works
            if form == "false":
                raise
            say(f"torch.compile does not work here: {type(e).__name__}: {str(e)[:200]}")
    best = min(times, key=lambda k: times[k])
    left = seconds - (time.perf_counter() - began) - 45  # start, evaluation, continuations
    steps = max(20, int(left / times[best] / 1.03) // 20 * 20)
    say(f"seconds per step by compile: {times}; {left:.0f} s left, {steps} steps")
    train(path, [*extra, f"run.compile={best}", f"optim.steps={steps}"])
    if seconds > 0:
        train(HERE / "greedy.yaml", [])


def heads(seconds: float, names: list[str], workers: int, gain: float, extra: list[str]) -> None:
    """Train the heads, `workers` at a time, all with the same number of steps."""
    began = time.perf_counter()
    if not Path(".train/greedy.safetensors").is_file():
        train(HERE / "greedy.yaml", [x for x in extra if x.startswith("greedy.")])
    times = {n: seconds_per_step(HERE / f"{n}.yaml", extra) for n in names}
    left = seconds - (time.perf_counter() - began) - 25 * -(-len(names) // workers)
    steps = max(20, int(left * gain / sum(times.values())) // 20 * 20)
    say(f"seconds per step {times}; {left:.0f} s left, {steps} steps each")
    cards = max(1, torch.cuda.device_count())
    waiting, running = list(enumerate(names)), dict[str, subprocess.Popen[bytes]]()
    failed = []
    while waiting or running:
        while waiting and len(running) < workers:
            i, name = waiting.pop(0)
            device = f"cuda:{i % cards}" if torch.cuda.is_available() else "cpu"
            overrides = [*extra, f"optim.steps={steps}", f"run.device={device}"]
            command = [sys.executable, "-m", "pcc.train", str(HERE / f"{name}.yaml")]
            for o in overrides:
                command += ["--set", o]
            say(" ".join(["pcc train", *command[3:]]))
            running[name] = subprocess.Popen(command)
        time.sleep(0.5)
        for name, p in list(running.items()):
            if p.poll() is not None:
                del running[name]
                failed += [name] if p.returncode else []
    if failed:
        sys.exit(f"recipe: failed: {failed}")


def main() -> int:
    """Read the stage and its time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("backbone", "heads", "smoke"))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--names", nargs="+", default=list(HEADS))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--gain", type=float, default=1.0, help="speed-up by running side by side")
    parser.add_argument("--compile", nargs="+", default=["false", "true"], help="forms to time")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    if args.stage == "backbone":
        backbone(args.seconds, args.compile, args.set)
    elif args.stage == "heads":
        heads(args.seconds, args.names, args.workers, args.gain, args.set)
    else:
        backbone(0, args.compile, args.set)
        few = ["greedy.rows=4096", "run.eval_prompts=16"]
        heads(0, args.names, args.workers, 1.0, [*few, *args.set])
        Path(".train/greedy.safetensors").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
