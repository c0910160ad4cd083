"""What `pcc.compile` and `pcc compile` are given and nothing would read: refused, never ignored."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from shipped import PCIR, Arena, Command, refused, small
from verifiers import KINDS

import pcc
from pcc import arguments
from pcc.cli.sources import compile_command
from pcc.driver import compile
from pcc.frontends import templates

GENERATING = ("max_seq", "chunk", "proposal", "draft_mode", "truncation")
OTHERS: dict[str, Any] = {
    "max_seq": 33, "chunk": 9, "proposal": "latent-first", "draft_mode": "max-product",
    "truncation": False,
}  # fmt: skip


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


def test_defaults_are_those_of_the_signatures() -> None:
    """A default that differed in one place would be taken for an option that is given."""
    for call in (compile, compile_command):
        signature = inspect.signature(call).parameters
        assert {k: signature[k].default for k in arguments.USUAL} == arguments.USUAL


@pytest.mark.parametrize("name", GENERATING)
def test_options_of_generation_need_a_verifier(name: str) -> None:
    found = refused("E145", lambda: pcc.compile(small(), out=None, **{name: OTHERS[name]}))
    assert found.what.startswith(f"{name}: ")


def test_all_that_nothing_reads_is_named_at_once() -> None:
    found = refused("E145", lambda: pcc.compile(small(), out=None, max_seq=33, chunk=9))
    assert found.what.startswith("max_seq, chunk: ")


def test_a_seed_needs_a_shape() -> None:
    refused("M162", lambda: pcc.compile(small(), out=None, seed=5))


@pytest.mark.parametrize("verifier", [False, True])
@pytest.mark.parametrize("option", ["proposal", "draft_mode"])
def test_words_are_checked_whether_or_not_they_are_read(
    option: str, verifier: bool, tmp_path: Path
) -> None:
    """Before anything is read or written: the model's folder does not even exist."""
    more: dict[str, Any] = {"verifier": tmp_path / "absent"} if verifier else {}
    for word in ("nonsense", ["full"], None):
        how: dict[str, Any] = {**more, option: word}
        refused("M142", lambda how=how: pcc.compile(small(), out=tmp_path / "m", **how))  # type: ignore[misc]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["onnx", "onnx-cuda"])
def test_an_architecture_is_of_engines(target: str) -> None:
    refused("E141", lambda: pcc.compile(small(), out=None, target=target, gpu="banana"))


def test_defaults_are_not_given() -> None:
    """Programs that pass every option on, at its default, are not refused."""
    made = pcc.compile(small(), out=None, queries=["loglik"], validate=False, gpu=None,
                       engine=None, **arguments.USUAL)  # fmt: skip
    assert list(made.manifest["queries"]) == ["loglik"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--max-seq", "2048"), "E145"),  # its default, but named
        (("--chunk", "9", "--max-seq", "33"), "E145"),
        (("--draft-mode", "stepwise"), "E145"),
        (("--proposal", "rubbish"), "E145"),
        (("--truncation",), "E145"),
        (("--no-truncation",), "E145"),
        (("--seed", "0"), "M162"),
        (("--seed", "5"), "M162"),
        (("--head", "cp,n=4,r=2", "--max-seq", "64"), "M162"),
        (("--gpu", "banana"), "E141"),
        (("--target", "onnx-cuda", "--gpu", "sm_90"), "E141"),
        (("--target", "tensorrt", "--engine", "level=9", "--engine", "level=1"), "E430"),
        (("--target", "tensorrt", "--engine", "strip"), "E430"),
        (("--verifier", "absent", "--proposal", "rubbish"), "M142"),
        (("--verifier", "absent", "--draft-mode", "nonsense"), "M142"),
    ],
)
def test_the_command_refuses_what_is_named(
    command: Command, tmp_path: Path, options: tuple[str, ...], code: str
) -> None:
    """Whatever its value; in one line, and nothing is left behind."""
    (tmp_path / "two.pcir").write_text(PCIR)
    out = tmp_path / "m.pcc"
    Arena(tmp_path, command).refuses(
        code, "compile", tmp_path / "two.pcir", "--query", "loglik", "-o", out, *options
    )


@pytest.mark.parametrize("int8", ["verifier", "all"])
def test_integers_of_a_verifier_need_one(int8: str) -> None:
    head = templates.cp(4, 3, 40, context=48, seed=2)
    found = refused("E141", lambda: pcc.compile(head, out=None, int8=int8))
    assert found.hint == "int8='head'"


def test_integers_that_a_head_cannot_have_are_refused(tmp_path: Path) -> None:
    """A head of trained tables has no matrix for them; the verifier beside it has."""
    _, model = KINDS["llama"](tmp_path / "model")
    head = templates.cp(4, 3, 258, seed=2)
    how: dict[str, Any] = {"verifier": model, "max_seq": 128, "chunk": 8, "queries": ["draft"],
                           "validate": False}  # fmt: skip
    out = tmp_path / "m.pcc"
    for int8, hint in (("all", "int8='verifier'"), ("head", "leave int8 out")):
        found = refused("E141", lambda x=int8: pcc.compile(head, out=out, int8=x, **how))  # type: ignore[misc]
        assert "no matrix of the head" in found.what
        assert hint in found.hint
    assert not out.exists()
    made = pcc.compile(head, out=out, int8="verifier", **how)
    assert made.manifest["precision"] == {"default": "fp32", "verifier": "fp32+int8"}
