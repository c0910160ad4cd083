"""Reports of GPU runs are merged: the newest stays, what is not plainly equal is kept."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: pcc may be an installed one

from benchmarks.gpu import device_kernels, merge, reports


def entry(stage: str, name: str, commit: str, **data: object) -> dict[str, object]:
    return {"stage": stage, "name": name, "commit": commit, "date": commit, "data": data}


def test_a_machine_is_described_by_its_newest_report() -> None:
    one = entry("environment", "environment", "a", gpu="NVIDIA X, 1.0", nvcc="12")
    two = entry("environment", "environment", "b", gpu="NVIDIA X, 2.0", nvcc="13")
    other = entry("environment", "environment", "c", gpu="NVIDIA Y, 2.0", nvcc="13")
    found = reports.machines(reports.machines([], [one, other]), [two, entry("torch", "t", "d")])
    assert [(r["commit"], r["nvcc"]) for r in found] == [("b", "13"), ("c", "13")]


def test_gaps_of_a_bundle_are_its_newest_and_a_table() -> None:
    row = {"ahead": True, "greedy": False, "rounds": 9, "gap_us": {"p50": 1.25}, "beside_us": 7.0}
    old = entry("cuda-s-b1", "host-gap", "a", gpu="NVIDIA X", rows=[row | {"beside_us": 99.0}])
    new = entry("cuda-s-b1", "host-gap", "b", gpu="NVIDIA X", rows=[row])
    found = reports.host(reports.host([], [old]), [new])
    assert [r["commit"] for r in found] == ["b"]
    table = reports.gaps(found)
    assert "| cuda-s-b1 | yes | sampled | 9 | 1.2 | 7.0 | X |" in table
    assert "99" not in table


def test_parts_of_a_check_keep_what_differs() -> None:
    bad = {"case": "c", "what": "w", "verdict": "differs", "error": 2.0, "bound": 1.0, "half": []}
    good = {"case": "d", "verdict": "ok"}
    old = {
        "gpu": "X",
        "runs": [{"part": "halves", "commit": "a"}, {"part": "times", "commit": "a"}],
    }
    made = reports.checked(old, [{"halves": {"rows": [bad, good], "ended": "ok"}}], "b")
    assert [(r["part"], r["commit"]) for r in made["runs"]] == [("halves", "b"), ("times", "a")]
    halves = made["runs"][0]
    assert halves["verdicts"] == {"differs": 1, "ok": 1}
    assert halves["not_ok"] == [{k: v for k, v in bad.items() if k != "half"}]


def test_the_level_of_quick_builds_is_said() -> None:
    report = {"batches": [1], "engine": {"level": "0", "workspace": "1"}, "complete": True}
    assert merge.ran(report, "queries") == "batch 1; level=0"


def test_a_trace_is_divided_by_what_kernels_do() -> None:
    names = {
        "flash_fwd_splitkv_kernel": "attention", "fmha_cutlassF_f16_aligned": "attention",
        "nvjet_hsh_64x8": "products", "void pcc_narrow_f16": "products",
        "void onnxruntime::cuda::_BinaryElementWiseSimple<OP_Mul>": "element-wise",
        "void onnxruntime::cuda::Transpose4DKernel": "moves", "Memcpy DtoD": "moves",
        "void softmax_warp_forward<float>": "softmax", "simplified_layer_norm": "norms, reductions",
        "CastKernelStd": "casts", "what is it": "other",
    }  # fmt: skip
    assert {n: device_kernels.family(n) for n in names} == names
    events = [("gemm", 40.0), ("gemm", 60.0), ("CastKernelStd", 5.0)] * device_kernels.ROUNDS
    found = device_kernels.summary(events, 150.0)
    assert found["launches"] == 3
    assert found["between_us"] == 45.0
    assert found["families"] == [
        {"family": "products", "launches": 2, "us": 100.0, "of_round": 0.667},
        {"family": "casts", "launches": 1, "us": 5.0, "of_round": 0.033},
    ]
    assert [k["name"] for k in found["kernels"]] == ["gemm", "CastKernelStd"]
    made = [entry(f"s{i}", "device-kernels", c, gpu="NVIDIA X", **found) for i, c in ((1, "a"),)]
    newer = entry("s1", "device-kernels", "b", gpu="NVIDIA X", bundle="s1.pcc", **found)
    kept = reports.traces(reports.traces([], made), [newer])
    assert [(r["name"], r["commit"]) for r in kept] == [("s1", "b")]
    assert "bundle" not in kept[0]
    table = reports.families(kept)
    assert "| s1 | products | 2 | 100 | 66.7% | X |" in table
    assert "| s1 | between them |  | 45 | 30.0% | X |" in table


def test_a_build_belongs_to_the_rows_of_its_stage_and_commit() -> None:
    parts = [
        {"stage": "s", "commit": "a", "name": "compile", "status": 0, "seconds": 60.5},
        {"stage": "s", "commit": "b", "name": "compile", "status": 1, "seconds": 9.0},
        {"stage": "t", "commit": "a", "name": "bench", "status": 0, "seconds": 9.0},
    ]
    assert reports.builds(parts) == {("s", "a"): 60.5}


def test_tests_on_a_gpu_keep_what_did_not_pass() -> None:
    proofs = {"t.py::a": {"outcome": "failed", "reason": "wrong"}, "t.py::b": {"outcome": "passed"},
              "t.py::c": {"outcome": "skipped", "reason": "no C"}}  # fmt: skip
    data = {"date": "d", "complete": True, "files": {"t.py": {"passed": 7}}, "not_run": {},
            "proofs": proofs, "machine": {}}  # fmt: skip
    part = entry("tests", "tests", "c", **data) | {"status": 1, "seconds": 9.0}
    found = reports.tested({}, [part])
    assert found["commit"] == "c"
    assert found["not_passed"] == {"t.py::a": "wrong", "t.py::c": "no C"}
    assert reports.tested(found, []) == found
