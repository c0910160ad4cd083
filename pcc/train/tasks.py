"""What is learnt: a backbone (next byte, and several at once), or a head on a frozen backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pcc.errors import PccError
from pcc.frontends.state import find_model, lookup, read_config
from pcc.train import backbone as bb
from pcc.train import config as cfg
from pcc.train import data
from pcc.train.evaluate import Acceptance, bits_per_byte
from pcc.train.files import read_weights, sha256, write_json, write_tensors
from pcc.train.given import read_greedy, read_multi_byte, same_circuit
from pcc.train.head import CircuitHead
from pcc.train.layout import save_head
from pcc.train.loop import device_of
from pcc.train.lora import DraftLayers


def documents(c: cfg.Data) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return (train, held out) documents of a configuration; held-out text is deduplicated.

    Errors: C110, C111, N141, N142, N144.
    """
    if c.packed:
        return data.load_packed(Path(c.packed))
    train, held = data.read_paths(c.paths, c.suffix), data.read_paths(c.heldout, c.suffix)
    train = {k: v for k, v in train.items() if k not in held}
    if held:
        held, _ = data.remove_near_duplicates(held, train.values())
    if c.heldout and not held:
        what = "no held-out text is left: it is empty, or all of it occurs in the training text"
        raise PccError("N144", what, at=", ".join(c.heldout), hint="hold out other files")
    return train, held


class _Shared:
    """Device, precision and data that every task has."""

    def __init__(self, config: cfg.Config) -> None:
        self.config, self.device = config, device_of(config.run)
        train, self.heldout = documents(config.data)
        self.packed = data.pack(train)
        self.card = {
            "train_documents": len(train),
            "train_bytes": sum(map(len, train.values())),
            "train_sha256": self.packed.sha256,
            "heldout": {k: len(v) for k, v in self.heldout.items()},
        }

    def inputs(self) -> dict[str, str]:
        return {"data": self.packed.sha256}

    def _needs_text(self) -> None:
        """Refuse an evaluation without held-out text before the first step. Errors: N144."""
        if not self.heldout:
            hint = "name held-out text (data.heldout), or set run.eval_every=0"
            raise PccError("N144", "there is no held-out text to evaluate on", hint=hint)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.bf16)

    def rows(self, step: int, part: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        o = self.config.optim
        number = step * o.accumulate + part
        ids, owner = self.packed.rows(self.config.seed, number, count, length)
        return self.to(ids), self.to(owner)

    def to(self, x: data.Ids) -> Tensor:
        t = torch.from_numpy(np.ascontiguousarray(x))
        if self.device.type == "cuda":
            return t.pin_memory().to(self.device, non_blocking=True)
        return t.to(self.device)


class BackboneTask(_Shared):
    """CE(x_{t+1} | h_t) + the multi-byte loss, whose heads later start the drafting heads."""

    def __init__(self, config: cfg.Config) -> None:
        super().__init__(config)
        sizes = bb.describe(config.model)
        self.model = bb.Backbone(sizes)
        self.model.reset(config.seed)
        m = config.multi_byte
        extra = max(0, m.n - 1)
        g = torch.Generator().manual_seed(config.seed + 1)
        shape = (extra, bb.VOCAB, config.model.width)
        self.extra = nn.Parameter(0.02 * torch.randn(*shape, generator=g).to(self.device))
        self.model.to(self.device)
        if config.run.eval_every:
            self._evaluable()
        self.run = torch.compile(self.model) if config.run.compile else self.model

    def _evaluable(self) -> None:
        """Refuse before the first step what could not be evaluated after it. Errors: N143, N144."""
        self._needs_text()
        least = self.config.data.length - 1
        if max(map(len, self.heldout.values())) < least:
            what = f"no held-out document fills a row of {least} bytes"
            hint = "hold out longer text, or set data.length lower, or run.eval_every=0"
            raise PccError("N143", what, hint=hint)

    def parameters(self) -> dict[str, nn.Parameter]:
        named = dict(self.model.named_parameters())
        return named | ({"multi_byte": self.extra} if len(self.extra) else {})

    def loss(self, step: int, part: int) -> dict[str, Tensor]:
        c = self.config
        ids, owner = self.rows(step, part, c.optim.batch, c.data.length)
        with self.autocast():
            h = self.run(ids)
            logits = self.model.lm_head(h[:, :-1])
        main = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        found = {"hidden": h, "next": main, "loss": main}
        if len(self.extra):
            several = self._several(step, h, ids, owner)
            found |= {"several": several, "loss": main + c.multi_byte.weight * several}
        return found

    def _several(self, step: int, h: Tensor, ids: Tensor, owner: Tensor) -> Tensor:
        """mean_j gamma^(j-1) CE(x_{t+j} | h_t), j = 2..n, at a random part of the positions."""
        m, t = self.config.multi_byte, ids.shape[1]
        room = t - m.n
        count = max(1, int(m.fraction * room))
        at = np.random.default_rng([self.config.seed, step, 1]).permutation(room)[:count]
        start = self.to(np.sort(at))
        want = start[:, None] + torch.arange(2, m.n + 1, device=self.device)
        target = ids[:, want]  # [B,P,n-1]
        target = torch.where(owner[:, want] == owner[:, start][..., None], target, -100)
        with self.autocast():
            logits = h[:, start] @ self.extra.flatten(0, 1).T
        logits = logits.view(-1, bb.VOCAB).float()
        each = functional.cross_entropy(logits, target.flatten(), reduction="none")
        gamma = m.gamma ** torch.arange(1, m.n, device=self.device)
        return (each.view(-1, m.n - 1) * gamma).mean(0).sum() / gamma.sum()

    def evaluate(self) -> dict[str, float]:
        if not self.heldout:
            return {}
        c = self.config
        bits = bits_per_byte(self.model, self.heldout, c.data.length, self.device)
        return {"heldout_bits_per_byte": bits}

    def export(self, step: int) -> None:
        out = Path(self.config.out)
        bb.save(self.model, out, self.config.run.storage, {"step": str(step)})
        if len(self.extra):
            whole = torch.cat([self.model.lm_head.weight[None], self.extra])
            write_tensors(out / "multi_byte" / "heads.safetensors", {"heads": whole}, torch.float16)
        write_json(out / "train.json", {"config": cfg.plain(self.config), "data": self.card})


class HeadTask(_Shared):
    """Discounted NLL of the circuit's conditionals on a frozen backbone, optionally with LoRA."""

    def __init__(self, config: cfg.Config) -> None:
        super().__init__(config)
        folder = Path(config.backbone)
        self.model = bb.load(folder).to(self.device).requires_grad_(False)
        width, vocab = self.model.config["hidden_size"], self.model.config["vocab_size"]
        self.head = CircuitHead(config.head, vocab, width, config.seed)
        self.head.initialise(read_multi_byte(folder, self.model))
        self.draft = None
        if config.lora.layers:
            self.draft = DraftLayers(self.model, config.lora, config.seed).to(self.device)
        if config.init:
            self._continue(Path(config.init))
        self.head.to(self.device)
        self.greedy: data.Ids | None = None
        if given := config.loss.greedy:
            self.greedy, self.given = read_greedy(Path(given), folder, self.model, self.head.n)
        self.acceptance: Acceptance | None = None
        if config.run.eval_every:
            self._evaluable()

    def _evaluable(self) -> None:
        """Refuse before the first step what could not be evaluated after it.

        Errors: N102, N120, N143, N144.
        """
        self._needs_text()
        r, off = self.config.run, "or set run.eval_every=0"
        if r.eval_bytes < self.head.n:
            what = f"run.eval_bytes is {r.eval_bytes}, less than the window of {self.head.n}"
            raise PccError("N102", what, hint=f"raise run.eval_bytes, {off}")
        room = self.model.config["max_position_embeddings"]
        if r.eval_prompt + r.eval_bytes > room:
            what = (
                f"prompts and their continuations are longer than the backbone's {room} positions"
            )
            raise PccError("N120", what, hint=f"lower run.eval_prompt or run.eval_bytes, {off}")
        data.prompts(self.heldout, r.eval_prompts, r.eval_prompt, self.config.seed)

    def inputs(self) -> dict[str, str]:
        c = self.config
        folder = Path(c.backbone)
        files = {
            "backbone": folder / "model.safetensors",
            "backbone_config": folder / "config.json",
        }
        if c.loss.greedy:
            files["greedy"] = Path(c.loss.greedy)
        if c.init:
            files["init"] = find_model(Path(c.init))
        return super().inputs() | {k: sha256(p) for k, p in files.items()}

    def _continue(self, folder: Path) -> None:
        """Take the weights of a head folder, its adapters included. Errors: F101, F102, N112."""
        described = read_config(folder / "config.yaml")
        values = read_weights(find_model(folder))
        same_circuit(described, values, self.head, str(folder))
        self.head.assign(values)
        stored = {k: v for k, v in values.items() if ".lora_" in k}
        if not stored:
            return  # new adapters start at zero: the draft is the same
        if self.draft is None:
            hint = "set lora.layers, lora.r, lora.alpha and lora.targets as they were there"
            raise PccError(
                "N112", "this head has adapters, the new one none", at=str(folder), hint=hint
            )
        alpha = lookup(described, "adaptor.hyperparameters.lora_alpha")
        if alpha != self.config.lora.alpha:
            raise PccError("N112", f"the adapters there have lora.alpha {alpha}", at=str(folder))
        self.draft.assign(stored)

    def parameters(self) -> dict[str, nn.Parameter]:
        found = dict(self.head.named_parameters())
        return found | (self.draft.trained() if self.draft is not None else {})

    def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the draft's hidden states, and the verifier's logits where they are asked for."""
        c = self.config
        with self.autocast():
            with torch.no_grad():
                stop = self.draft.start if self.draft is not None else None
                shared = self.model.states(ids, stop)
                depth = self.model.depth if stop is None else stop
                own = self.draft is None or c.loss.distill > 0
                verifier = self.model.finish(shared, depth) if own else None
                logits = None
                if c.loss.distill > 0 and verifier is not None:
                    logits = self.model.lm_head(verifier).float()
            if self.draft is not None:
                return self.draft(shared), logits
        assert verifier is not None
        return verifier, logits

    def loss(self, step: int, part: int) -> dict[str, Tensor]:
        ids, owner, first = self._batch(step, part)
        h, logits = self.hidden(ids)
        n = self.head.n
        b, t = ids.shape
        row, start = self._positions(step, part, b, t - n, first)
        index = start[:, None] + torch.arange(1, n + 1, device=self.device)
        x, e = ids[row[:, None], index], h[row, start]
        inside = owner[row[:, None], index] == owner[row, start][:, None]
        c = self.config.loss
        weight = c.gamma ** torch.arange(n, device=self.device, dtype=torch.float32)
        weight[0] = c.first
        with self.autocast():
            if c.distill > 0:
                each, rows = self.head.log_rows(e, x)
            else:
                each, rows = self.head(e, x), None
        nll = -torch.where(inside, each, 0.0).sum(0) / inside.sum(0).clamp(min=1)
        loss = (weight * nll).sum() / weight.sum()
        found = {"hidden": e, "conditionals": each, "nll_per_byte": nll.mean(), "loss": loss}
        if rows is not None and logits is not None:
            p = torch.log_softmax(logits[row[:, None], index - 1], -1)
            kl = (p.exp() * (p - rows)).sum(-1)
            kl = torch.where(inside, kl, 0.0).sum(0) / inside.sum(0).clamp(min=1)
            kl = (weight * kl).sum() / weight.sum()
            found |= {"kl": kl, "loss": loss + c.distill * kl}
        return found

    def _batch(self, step: int, part: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, documents and, per row, the first position that is trained at."""
        c = self.config
        count = c.optim.batch
        if self.greedy is None:
            ids, owner = self.rows(step, part, count, c.data.length)
            return ids, owner, torch.zeros(count, dtype=torch.long)
        own = round(c.loss.greedy_fraction * count)
        length = self.greedy.shape[1]
        rng = np.random.default_rng([c.seed, step * c.optim.accumulate + part, 2])
        mine = self.greedy[rng.integers(len(self.greedy), size=own)].astype(np.int64)
        ids, owner = self.rows(step, part, max(1, count - own), length)
        ids = torch.cat([ids[: count - own], self.to(mine)])
        same = torch.full((own, length), -1, device=self.device)
        owner = torch.cat([owner[: count - own], same])
        first = torch.zeros(count, dtype=torch.long)
        first[count - own :] = self.given - 1
        return ids, owner, first

    def _positions(
        self, step: int, part: int, rows: int, room: int, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (row, position) pairs that the circuit is evaluated at."""
        c = self.config
        if room < 1:
            raise PccError("N140", f"rows of {room + self.head.n} ids leave no window")
        rng = np.random.default_rng([c.seed, step * c.optim.accumulate + part, 3])
        row, at = np.nonzero(np.arange(room)[None] >= first.numpy()[:, None])
        if 0 < c.loss.positions < len(row):
            pick = np.sort(rng.choice(len(row), c.loss.positions, replace=False))
            row, at = row[pick], at[pick]
        return self.to(row), self.to(at)

    def evaluate(self) -> dict[str, float]:
        if not self.heldout:
            return {}
        if self.acceptance is None:
            r = self.config.run
            rows = data.prompts(self.heldout, r.eval_prompts, r.eval_prompt, self.config.seed)
            self.acceptance = Acceptance.of(self.model, self.to(rows), r.eval_bytes)
        return self.acceptance.measure(self.head, self.draft)

    def export(self, step: int) -> None:
        save_head(Path(self.config.out), self.config, self.head, self.draft, step)
        write_json(
            Path(self.config.out) / "train.json",
            {"config": cfg.plain(self.config), "data": self.card},
        )
