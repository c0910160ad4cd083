"""The loop: loss, gradients, AdamW, metrics, checkpoints, resume. What is learnt is a `Task`."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pcc.errors import PccError
from pcc.files import finite
from pcc.train import checkpoint
from pcc.train import config as cfg
from pcc.train.files import write
from pcc.train.lock import exclusive


class Task(Protocol):
    """What a run learns."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""

    def inputs(self) -> dict[str, str]:
        """Return the hash of each file that decides the weights."""

    def loss(self, step: int, part: int) -> dict[str, Tensor]:
        """Return `loss` and other tensors worth a look, for micro-batch `part` of `step`."""

    def evaluate(self) -> dict[str, float]:
        """Return metrics on held-out data; may be empty."""

    def export(self, step: int) -> None:
        """Write what others read."""


def device_of(run: cfg.Run) -> torch.device:
    """Return the device that was asked for. Errors: N102, X120."""
    name = run.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        hint = "auto, cpu, cuda or cuda:NUMBER"
        raise PccError("N102", f"run.device is {name[:40]!r}", hint=hint)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PccError("X120", "there is no CUDA device", hint="set run.device to cpu")
    device = torch.device(name)
    if device.index and device.index >= torch.cuda.device_count():
        what = f"there is no device {name}, only {torch.cuda.device_count()}"
        raise PccError("X120", what, hint="choose a lower number in run.device")
    return device


def rate(o: cfg.Optim, step: int) -> float:
    """Lr min(1, (step+1)/warmup) s(t), s = cosine, line or constant from 1 to `floor`."""
    warm = min(1.0, (step + 1) / max(1, o.warmup))
    t = min(1.0, step / max(1, o.steps))
    shape = {
        "constant": 1.0,
        "linear": 1.0 - t,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * t)),
    }[o.schedule]
    return o.lr * warm * (o.floor + (1.0 - o.floor) * shape)


def adamw(params: dict[str, nn.Parameter], o: cfg.Optim) -> torch.optim.AdamW:
    """Return AdamW; vectors (norms, biases) do not decay."""
    flat = [p for n, p in params.items() if p.ndim < 2 or "bias" in n]
    wide = [p for n, p in params.items() if not (p.ndim < 2 or "bias" in n)]
    groups = [
        {"params": wide, "weight_decay": o.weight_decay},
        {"params": flat, "weight_decay": 0.0},
    ]
    fused = any(p.is_cuda for p in params.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], o.lr, o.betas, fused=fused)


class Loop:
    """One run in `folder`: resumes from its newest state, if there is one."""

    def __init__(self, config: cfg.Config, task: Task, *, progress: bool = True) -> None:
        self.config, self.task, self.progress = config, task, progress
        self.folder = Path(config.out)
        self.params = task.parameters()
        self.optimizer = adamw(self.params, config.optim)
        self.mark = checkpoint.fingerprint(_lasting(cfg.plain(config)) | {"inputs": task.inputs()})
        self.bad: Tensor | None = None  # 2 (first bad step) + (0: loss, 1: gradient); -1: none
        self.recent: list[dict[str, Tensor]] = []
        self.metrics = self.folder / "metrics.jsonl"

    def run(self, until: int | None = None) -> dict[str, float]:
        """Train to the last step (or `until`), export, and return the last evaluation.

        A finished run is exported and evaluated again: its new evaluation replaces the old one.
        Errors: N130 (no writing), N152 (another run is in the folder), N150, N151, N160.
        """
        with exclusive(self.folder, "run", cannot="N130", taken="N152"):
            return self._run(until)

    def _run(self, until: int | None) -> dict[str, float]:
        c, o = self.config.run, self.config.optim
        start = self._resume()
        last = o.steps if until is None else min(until, o.steps)
        began, bar = time.perf_counter(), _Bar(self.progress, o.steps, self.config.name or "train")
        try:
            for step in range(start, last):
                self._step(step)
                done = step + 1
                if (c.check_every and done % c.check_every == 0) or done == last:
                    self._check()
                if (c.log_every and done % c.log_every == 0) or done == last:
                    seconds = (time.perf_counter() - began) / (done - start)
                    self._log(done, seconds, bar)
                if c.eval_every and done % c.eval_every == 0 and done < last:
                    self._evaluate(done, bar)
                if (c.save_every and done % c.save_every == 0) or done == last:
                    self._check()
                    self.save(done)
        finally:
            bar.close()  # gives the cursor back
        if last < o.steps:
            return {}
        self.task.export(last)  # first: no evaluation may cost a trained model
        return self._evaluate(last, bar) if c.eval_every else {}

    def save(self, step: int) -> None:
        """Write the state."""
        keep = max(1, self.config.run.keep)
        checkpoint.save_state(self.folder, step, self.params, self.optimizer, self.mark, keep)

    def _resume(self) -> int:
        path = checkpoint.latest(self.folder)
        step = 0
        if path is not None:
            step = checkpoint.load_state(path, self.params, self.optimizer, self.mark)
        self._cut_metrics(step)
        return step

    def _cut_metrics(self, step: int) -> None:
        """Drop lines of steps that will be done again, and the last evaluation, made again."""
        if self.metrics.is_file():
            lines = self.metrics.read_text().splitlines(keepends=True)
            kept = [x for x in lines if step and _line_step(x) <= step]
            if step >= self.config.optim.steps:
                kept = [x for x in kept if not (_line_step(x) == step and '"evaluation"' in x)]
            if kept != lines:
                write(self.metrics, "".join(kept).encode())

    def _step(self, step: int) -> None:
        o = self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = rate(o, step)
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        for part in range(o.accumulate):
            found = self.task.loss(step, part)
            if self.config.run.check_every == 1 and not torch.isfinite(found["loss"]):
                self._stop(step, found)
            (found["loss"] / o.accumulate).backward()  # type: ignore[no-untyped-call]
            for k, v in found.items():
                if v.ndim == 0:
                    total[k] = total.get(k, torch.zeros_like(v)) + v.detach() / o.accumulate
        total["grad_norm"] = self._clip(step, total)
        self._flag(step, total)
        self.recent = [*self.recent, total][-max(1, self.config.run.log_every) :]
        self.optimizer.step()

    def _clip(self, step: int, found: dict[str, Tensor]) -> Tensor:
        """Return the gradient's norm before it is clipped."""
        params = list(self.params.values())
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if self.config.run.check_every == 1 and not torch.isfinite(norm):
            self._stop(step, found)  # before a NaN norm scales all gradients, and the update
        nn.utils.clip_grads_with_norm_(params, self.config.optim.clip or math.inf, norm)
        return norm

    def _flag(self, step: int, found: dict[str, Tensor]) -> None:
        """Keep the first step that is not finite, on the device: looking would make it wait."""
        loss, norm = torch.isfinite(found["loss"]), torch.isfinite(found["grad_norm"])
        none = torch.full((), -1, dtype=torch.long, device=loss.device)
        now = torch.where(loss & norm, none, 2 * step + loss.long())
        self.bad = now if self.bad is None else torch.where(self.bad < 0, now, self.bad)

    def _check(self) -> None:
        """Look at the losses since the start. Errors: N160."""
        bad = -1 if self.bad is None else int(self.bad)
        if bad >= 0:
            what = "the gradient's norm" if bad % 2 else "the loss"
            self._fail(bad // 2, what, "run.check_every=1 names the tensor; ")

    def _stop(self, step: int, found: dict[str, Tensor]) -> None:
        """Name the step and the first tensor that is not finite. Errors: N160."""
        names = [(f"weight {n}", p.detach()) for n, p in self.params.items()]
        names += found.items()
        names += [
            (f"gradient of {n}", p.grad) for n, p in self.params.items() if p.grad is not None
        ]
        where = next((n for n, v in names if not torch.isfinite(v).all()), "the gradient's norm")
        self._fail(step, where, "")

    def _fail(self, step: int, where: str, more: str) -> None:
        """Stop at a step. Errors: N160."""
        what = f"step {step}: {where} is not finite"
        saved = checkpoint.latest(self.folder)
        good = f"the last good state is {saved.name if saved else 'the start'}"
        raise PccError("N160", what, at=self.config.out, hint=f"{more}{good}; lower optim.lr")

    def _log(self, step: int, seconds: float, bar: _Bar) -> None:
        recent = self.recent
        line: dict[str, Any] = {"step": step, "lr": rate(self.config.optim, step - 1)}
        for k in recent[-1]:
            line[k] = round(float(torch.stack([f[k] for f in recent]).mean()), 5)
        line["seconds_per_step"] = round(seconds, 5)
        self._write(line)
        bar.show(step, line)

    def _evaluate(self, step: int, bar: _Bar) -> dict[str, float]:
        with torch.no_grad():
            found = self.task.evaluate()
        if found:
            self._write({"step": step, "evaluation": found})
            bar.note(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
        return found

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with self.metrics.open("a") as f:
                f.write(json.dumps(finite(line), allow_nan=False) + "\n")
        except OSError as e:
            what = f"cannot write: {e.strerror or e}"
            hint = "make room and run the same command again: it resumes"
            raise PccError("N130", what, at=str(self.metrics), hint=hint) from None


def _line_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the weights: not where the files lie, nor how often they are written."""
    return {k: v for k, v in config.items() if k not in ("run", "out", "name")} | {
        "bf16": config["run"]["bf16"]
    }


class _Bar:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, on: bool, total: int, title: str) -> None:
        self.on, self.total, self.title = on, total, title
        self.bar: Any = None
        self.last = -math.inf
        if on and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(title, total=total)
            self.bar.start()

    def show(self, step: int, line: dict[str, Any]) -> None:
        """Show how far the run is."""
        if not self.on:
            return
        left = (self.total - step) * line["seconds_per_step"]
        text = f"{self.title} {step}/{self.total} loss {line['loss']:.4f} {left:.0f} s left"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        elif time.perf_counter() - self.last > 10 or step == self.total:
            self.last = time.perf_counter()
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self.on:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
