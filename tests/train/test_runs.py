"""Whole runs at toy size: what they write, exact resume, NaN, full disks, bad configurations."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from training import TEXT, backbone, head, weights  # noqa: E402

import pcc  # noqa: E402
from pcc.errors import PccError  # noqa: E402
from pcc.frontends.mtpc import load_mtpc  # noqa: E402
from pcc.interp.reference import reference  # noqa: E402
from pcc.train import backbone as bb  # noqa: E402
from pcc.train import checkpoint, cli, data, files, loop  # noqa: E402
from pcc.train import config as cfg  # noqa: E402
from pcc.train.evaluate import _replay, continuations  # noqa: E402
from pcc.train.layout import also_on, quantise_backbone  # noqa: E402
from pcc.train.lora import DraftLayers  # noqa: E402
from pcc.train.tasks import HeadTask  # noqa: E402


def test_backbone_folder_and_metrics(ground: Path) -> None:
    out = ground / "backbone"
    conf = json.loads((out / "config.json").read_text())
    assert (conf["model_type"], conf["vocab_size"], conf["bos_token_id"]) == ("llama", 258, 256)
    state, _ = files.read_tensors(out / "model.safetensors")
    assert state["model.layers.1.self_attn.k_proj.weight"].shape == (8, 16)
    assert all(v.dtype == torch.float16 for v in state.values())
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 4, 6, 6]
    assert lines[-1]["evaluation"]["heldout_bits_per_byte"] > 0
    assert lines[2]["loss"] < lines[0]["loss"]
    assert len(list(out.glob("state@*"))) == 2


def test_decoding_with_a_cache_equals_without(ground: Path) -> None:
    model = bb.load(ground / "backbone")
    start = torch.from_numpy(data.prompts({"t": TEXT["f1"]}, 2, 20, 0))
    got = continuations(model, start, 8)
    ids = start
    with torch.no_grad():
        for _ in range(8):
            best = model.lm_head(model(ids)[:, -1])[:, :256].argmax(-1)
            ids = torch.cat([ids, best[:, None]], 1)
    assert (got == ids).all()


def test_a_row_does_not_see_its_future(ground: Path) -> None:
    model = bb.load(ground / "backbone")
    ids = torch.arange(20)[None]
    other = ids.clone()
    other[0, 12] = 99
    with torch.no_grad():
        a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :12], b[:, :12], atol=0, rtol=0)
    assert (a[:, 12:] != b[:, 12:]).any()


@pytest.mark.parametrize("kind", ["backbone", "head"])
def test_resume_gives_the_same_weights(ground: Path, tmp_path: Path, kind: str) -> None:
    make = backbone if kind == "backbone" else head
    a, b = tmp_path / "a", tmp_path / "b"
    cli.run(cfg.build(make(ground, a)), progress=False)
    conf = cfg.build(make(ground, b))
    cli.run(conf, progress=False, until=3)
    assert checkpoint.latest(b).name == "state@3.safetensors"  # type: ignore[union-attr]
    cli.run(conf, progress=False)
    whole, resumed = weights(a), weights(b)
    assert set(whole) == set(resumed)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    strip = [
        [{k: v for k, v in json.loads(x).items() if k != "seconds_per_step"} for x in lines]
        for lines in ((p / "metrics.jsonl").read_text().splitlines() for p in (a, b))
    ]
    assert strip[0][-1] == strip[1][-1]
    with pytest.raises(PccError, match="N150"):
        cli.run(cfg.build(make(ground, b) | {"seed": 5}), progress=False)


@pytest.mark.parametrize("lora", [0, 1])
def test_head_folder_is_the_trained_circuit(ground: Path, tmp_path: Path, lora: int) -> None:
    conf = cfg.build(head(ground, tmp_path / "h", lora={"layers": lora, "r": 2}))
    found = cli.run(conf, progress=False)
    assert 0 <= found["accepted_stepwise"] <= 3
    task = HeadTask(conf)
    state = weights(tmp_path / "h")
    with torch.no_grad():
        for name, p in task.parameters().items():
            p.copy_(
                state[f"weight.{name}"].half() if "lora" not in name else state[f"weight.{name}"]
            )
    ids = torch.arange(40, 60)[None]
    hidden, _ = task.hidden(ids)
    plain = task.model(ids)
    assert (hidden != plain).any() == bool(lora)
    x = torch.randint(256, (3, 4), generator=torch.Generator().manual_seed(0))
    e = hidden[0, :3].detach()
    circuit = load_mtpc(tmp_path / "h")
    want = reference(circuit, "prefix", {"x": x.numpy(), "context": e.numpy()})["log_cond"]
    got = task.head(e, x).detach().numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)
    names = files.read_tensors(next((tmp_path / "h").glob("model@*")))[0]
    key = "lm._lm.base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert (key in names) == bool(lora)
    if lora:
        assert names[key].dtype == torch.float32


def test_adapters_are_merged_weights(ground: Path) -> None:
    model = bb.load(ground / "backbone").requires_grad_(False)
    layers = DraftLayers(model, cfg.Lora(layers=1, r=2, alpha=6.0))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layers.trained().values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    ids = torch.arange(30, 50)[None]
    got = layers(model.states(ids, 1))
    merged = bb.load(ground / "backbone")
    for key, a in layers.adapters.items():
        i, part, name = key.split(".")
        w = getattr(getattr(merged.model.layers[int(i)], part), name).weight
        with torch.no_grad():
            w += 3.0 * a.lora_B @ a.lora_A
    torch.testing.assert_close(got, merged(ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layers(model.states(ids, 1)), got, atol=0, rtol=0)


@pytest.mark.parametrize("every", [1, 4])
def test_nan_stops_with_step_and_tensor(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    real = HeadTask.loss

    def broken(self: HeadTask, step: int, part: int) -> dict[str, torch.Tensor]:
        if step == 2:
            with torch.no_grad():
                self.head.base[1, 3] = float("nan")
        return real(self, step, part)

    monkeypatch.setattr(HeadTask, "loss", broken)
    raw = head(ground, tmp_path / "h")
    raw["run"] |= {"check_every": every}
    with pytest.raises(PccError) as e:
        cli.run(cfg.build(raw), progress=False)
    assert e.value.code == "N160"
    named = "weight base" if every == 1 else "the loss"  # the tensors of that step are gone
    assert f"step 2: {named} is not finite" in str(e.value)
    assert "state@2.safetensors" in str(e.value)
    good = weights(tmp_path / "h")
    assert all(torch.isfinite(v).all() for v in good.values())


@pytest.mark.parametrize("every", [1, 0])
def test_a_gradient_that_is_not_finite_is_named_before_it_spreads(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    real = HeadTask.loss

    def broken(self: HeadTask, step: int, part: int) -> dict[str, torch.Tensor]:
        found = real(self, step, part)
        if step == 1:  # zero, of infinite slope: only the gradient of `factor` is bad
            found["loss"] = found["loss"] + (
                0 * self.head.factor[0, 0, 0, 0].detach()
                + (self.head.factor[0, 0, 0, 0] * 0).sqrt()
            )
        return found

    monkeypatch.setattr(HeadTask, "loss", broken)
    raw = head(ground, tmp_path / "h")
    raw["run"] |= {"check_every": every, "save_every": 0}
    with pytest.raises(PccError) as e:
        cli.run(cfg.build(raw), progress=False)
    named = "gradient of factor" if every == 1 else "the gradient's norm"
    assert f"step 1: {named} is not finite" in str(e.value)
    assert checkpoint.latest(tmp_path / "h") is None


def test_full_disk_loses_no_checkpoint(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = cfg.build(head(ground, tmp_path / "h"))
    cli.run(conf, progress=False, until=2)
    before = weights(tmp_path / "h")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PccError) as e:
        cli.run(conf, progress=False)
    assert e.value.code == "N130"
    assert "No space left" in str(e.value)
    monkeypatch.undo()
    after = weights(tmp_path / "h")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not list((tmp_path / "h").glob("*.part"))
    cli.run(conf, progress=False)  # room again: it goes on
    assert (tmp_path / "h" / "model@4.safetensors").is_file()


def test_missing_and_damaged_files(ground: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("N122", {"backbone": str(tmp_path / "absent")}),
        ("N132", {"loss": {"greedy": str(tmp_path / "absent")}}),
        ("C111", {"data": {"packed": str(tmp_path / "absent")}}),
        ("N113", {"lora": {"layers": 7}}),
    ]
    for code, change in cases:
        with pytest.raises(PccError) as e:
            cli.run(cfg.build(head(ground, tmp_path / "h", **change)), progress=False)
        assert e.value.code == code, change
    conf = cfg.build(head(ground, tmp_path / "d"))
    cli.run(conf, progress=False)
    for older in ("from state@2.safetensors", "from the start"):
        path = checkpoint.latest(tmp_path / "d")
        assert path is not None
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(PccError, match="N132") as e:
            cli.run(conf, progress=False)
        assert older in str(e.value)
        path.unlink()


def test_configurations(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("kind: head\nout: x\noptim: {lr: 1e-3}\n")
    c = cfg.read(path, ["head.kind=hmm", "optim.steps=7", "lora.targets=[q_proj]"])
    assert (c.head.kind, c.optim.steps, c.optim.lr) == ("hmm", 7, 1e-3)
    assert c.lora.targets == ("q_proj",)
    for text in ("kind: x\nout: y", "kind: head", "kind: head\nout: x\nbad: 1", "[1]",
                 "kind: head\nout: x\noptim: {steps: many}", "kind: head\nout: x\noptim: 3",
                 "kind: head\nout: x\noptim: {steps: 0}",
                 "kind: head\nout: x\nseed: true"):  # fmt: skip
        path.write_text(text)
        with pytest.raises(PccError) as e:
            cfg.read(path)
        assert e.value.code in ("N101", "N102", "F102"), text
    with pytest.raises(PccError, match="N101"):
        cfg.read(path, ["novalue"])


def test_shipped_configurations_are_valid() -> None:
    root = Path(__file__).resolve().parents[2] / "examples" / "train"
    found = sorted(root.glob("*.yaml"))
    assert len(found) >= 8
    for path in found:
        cfg.read(path)


def test_rounds_are_replayed() -> None:
    # Rounds at 0 (accepts 2), 3 (0), 4 (1): three rounds, three accepted bytes.
    assert _replay([2, 9, 9, 0, 1, 9]) == 1.0


def test_command_line(ground: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import yaml

    path = tmp_path / "h.yaml"
    path.write_text(yaml.safe_dump(head(ground, tmp_path / "h")))
    assert cli.main([str(path), "--set", "optim.steps=2", "--quiet"]) == 0
    assert (tmp_path / "h" / "model@2.safetensors").is_file()
    assert cli.main([str(tmp_path / "absent.yaml")]) == 2
    assert "F102" in capfd.readouterr().err


def test_an_evaluation_that_fails_costs_no_model(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: HeadTask) -> dict[str, float]:
        raise PccError("N110", "this cannot be evaluated")

    settings = head(ground, tmp_path / "h")
    settings["run"] |= {"eval_every": 1000, "log_every": 0, "check_every": 0}  # 0: never
    monkeypatch.setattr(HeadTask, "evaluate", fail)
    with pytest.raises(PccError, match="N110"):
        cli.run(cfg.build(settings), progress=False)
    assert weights(tmp_path / "h")


def test_numbers_that_do_not_fit_are_never_written(tmp_path: Path) -> None:
    large = torch.tensor([7e4])
    for given, dtype in ((large.half(), None), (large, torch.float16)):
        with pytest.raises(PccError, match="N131"):
            files.write_tensors(tmp_path / "x.safetensors", {"w": given}, dtype)
        assert not (tmp_path / "x.safetensors").exists()
    files.write_tensors(tmp_path / "x.safetensors", {"w": large}, torch.bfloat16)


def test_a_full_disk_leaves_the_metrics_whole(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = cfg.build(head(ground, tmp_path / "h"))
    cli.run(conf, progress=False, until=2)
    metrics = tmp_path / "h" / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text(kept + '{"step": 3}\n')  # written after the state: it will be done again

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(PccError, match="N130"):
            cli.run(conf, progress=False)
    assert metrics.read_text() == kept + '{"step": 3}\n'
    cli.run(conf, progress=False, until=2)
    assert metrics.read_text() == kept


def test_a_head_that_overflows_its_storage_is_stored_wider_afterwards(
    ground: Path, tmp_path: Path
) -> None:
    raw = head(ground, tmp_path / "h")
    raw["head"] |= {"emissions": "linear", "noise": 1e9}
    with pytest.raises(PccError, match=r"N131.*proj does not fit torch.float16"):
        cli.run(cfg.build(raw), progress=False)
    assert not list((tmp_path / "h").glob("model@*"))
    raw["run"] |= {"storage": "f32", "eval_every": 0}
    cli.run(cfg.build(raw), progress=False)  # from the last state: nothing is trained again
    values = files.read_weights(tmp_path / "h" / "model@4.safetensors")
    assert max(float(v.abs().max()) for v in values.values()) > 65504


@pytest.mark.parametrize("stop", [KeyboardInterrupt, PccError("N160", "stopped")])
def test_the_bar_is_closed_however_a_run_ends(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def broken(self: HeadTask, step: int, part: int) -> dict[str, torch.Tensor]:
        raise stop

    closed: list[bool] = []
    monkeypatch.setattr(HeadTask, "loss", broken)
    monkeypatch.setattr(loop._Bar, "close", lambda bar: closed.append(True))
    with pytest.raises((KeyboardInterrupt, PccError)):
        cli.run(cfg.build(head(ground, tmp_path / "h")), progress=False)
    assert closed == [True]


def test_a_head_knows_its_backbone(ground: Path, tmp_path: Path) -> None:
    """A head on another backbone compiles, with a warning; a stored copy of its own is known."""
    made = tmp_path / "head"
    cli.run(cfg.build(head(ground, made)), progress=False)
    packed, other = tmp_path / "packed", tmp_path / "other"
    quantise_backbone(ground / "backbone", packed)
    cli.run(cfg.build(backbone(ground, other) | {"seed": 5}), progress=False)

    def compiled(verifier: Path) -> tuple[str, list[str]]:
        said: list[str] = []
        artifact = pcc.compile(
            made, verifier=verifier, queries=["prefix"], out=None, max_seq=64, validate=False,
            progress=said.append,
        )  # fmt: skip
        warned = [s for s in said if s.startswith("warning")]
        return artifact.manifest["verifier"]["trained_with_head"], warned

    assert compiled(ground / "backbone") == ("matches", [])
    found, warned = compiled(packed)
    assert (found, len(warned)) == ("differs", 1)
    also_on(made, packed)
    assert compiled(packed) == ("matches", [])
    assert compiled(other)[0] == "differs"


def test_metrics_are_json_whatever_is_measured(tmp_path: Path) -> None:
    """One prompt has no interval: null, not the Infinity that JSON lacks."""
    files.write_json(tmp_path / "m.json", {"a": [1.5, float("inf")], "b": (float("nan"),)})

    def refuse(name: str) -> float:
        raise ValueError(name)

    found = json.loads((tmp_path / "m.json").read_text(), parse_constant=refuse)
    assert found == {"a": [1.5, None], "b": [None]}
