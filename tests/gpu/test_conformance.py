"""A part of the suite on a GPU: some ops, a circuit's queries, two verifiers' texts.

All of it is `pcc conformance --target T --provider cuda`. Needs neither torch nor hypothesis.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pcc.conformance.bundles import Setting
from pcc.conformance.circuits import check_queries
from pcc.conformance.ops import check_ops, numbered
from pcc.conformance.report import Finding
from pcc.conformance.scenarios import SCENARIOS, check_protocol, int8_there
from pcc.conformance.texts import read
from pcc.errors import PccError

EXPECTED = Path(__file__).resolve().parents[2] / "benchmarks/results/conformance_expected.json.gz"
EVERY = 9  # of the cases: all of them are a stage of their own


@pytest.fixture(scope="module", params=["cuda", "onnx-cuda"])
def setting(request: pytest.FixtureRequest) -> Setting:
    from pcc.runtime.device.driver import device

    try:
        device()
    except PccError as e:
        pytest.skip(f"no GPU: {e.what}")
    if request.param == "onnx-cuda":
        ort = pytest.importorskip("onnxruntime", reason="onnxruntime-gpu is not installed")
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            pytest.skip("this onnxruntime has no CUDA provider")
    return Setting(request.param, "cuda", halves=("f16", "bf16"))


def quiet(_line: str) -> None:
    pass


def bad(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.bad]


def test_some_ops(setting: Setting, tmp_path: Path) -> None:
    cases = numbered(setting.halves, setting.target)[::EVERY]
    found = list(check_ops(setting, tmp_path, quiet, cases))
    assert len(found) > len(cases)
    assert not bad(found)


def test_queries_of_a_circuit(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcc.conformance import circuits

    one = {"btree-contextual": circuits.circuits()["btree-contextual"]}
    monkeypatch.setattr(circuits, "circuits", lambda: one)
    found = list(check_queries(setting, tmp_path, quiet))
    assert found
    assert not bad(found)


def test_texts_with_8_bit_weights(setting: Setting, tmp_path: Path) -> None:
    (s,) = (s for s in SCENARIOS if s.options.get("int8"))
    half = replace(setting, precision="fp16")
    if not int8_there(s, half):
        pytest.skip(f"target {setting.target} has no 8-bit weights")
    stored = read(EXPECTED)
    found = list(check_protocol(half, tmp_path, quiet, stored, (s,)))
    assert found
    assert not bad(found)


@pytest.mark.parametrize("name", ["llama-hmm-n4", "wide-evabyte-btree-n16"])
def test_texts_are_those_of_a_cpu(name: str, setting: Setting, tmp_path: Path) -> None:
    stored = read(EXPECTED)
    (s,) = (s for s in SCENARIOS if s.name == name)
    found = list(check_protocol(setting, tmp_path, quiet, stored, (s,)))
    assert found
    assert not bad(found)
