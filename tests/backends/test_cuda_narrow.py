"""The kernel `narrow`, its own source, run on a CPU under many orders of its threads and copies."""

import random
import shutil

import numpy as np
import pytest
from narrow_runs import Case, Form, Program, RefusedError, case, check

from pcc.errors import PccError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SCHEDULES = range(8)
FORMS = {
    "many strips of one cluster": Form(3, 520, 318, options={"bias": True, "squares": True}),
    "an odd number of strips": Form(
        16, 1016, 259, columns=2, options={"source": "norm", "epilogue": "residual"}
    ),
    "a block without a strip": Form(
        8, 512, 31, options={"source": "half", "squares": True, "epilogue": "residual"}
    ),
    "a cluster without a strip": Form(1, 488, 64, idle=1, options={"out": "half"}),
    "one block": Form(
        1, 264, 100, cluster=1, columns=2, arch="sm_120",
        options={"source": "norm", "epilogue": "gated", "out": "half", "bias": True},
    ),
    "8 bits": Form(
        9, 1096, 160, options={"integers": True, "bias": True, "squares": True, "source": "norm"}
    ),
    "8 bits, gated": Form(
        5, 1032, 70, columns=2, arch="sm_120",
        options={"integers": True, "source": "half", "epilogue": "gated", "activation": "gelu"},
    ),
    "8 bits, one block": Form(
        16, 520, 33, cluster=1, options={"integers": True, "epilogue": "residual", "dtype": "bf16"}
    ),
    "8 bits, twice the warps": Form(
        11, 2056, 70, columns=2, warps=16,
        options={"integers": True, "source": "norm", "epilogue": "gated", "dtype": "bf16"},
    ),
    "8 bits, twice the warps of one block": Form(
        2, 1048, 161, cluster=1, columns=2, warps=16,
        options={"integers": True, "source": "half", "epilogue": "residual", "squares": True},
    ),
    "bf16": Form(12, 536, 96, options={"dtype": "bf16", "source": "half", "out": "half"}),
}  # fmt: skip
TRIED = FORMS["many strips of one cluster"]  # both slots of both barriers are used again

SYNC = "leave(sum, i);\n      __syncthreads();"
AWAIT = "await_cluster(received() + slot * 8, r / 2 & 1);"
ARM = "if (c == 0 && lane == 0) expect_bytes(received() + slot * 8, C::CLUSTER * STEP);"
LAST = "if (i) finish((i - 1) / C::CLUSTER);\n      wait_cluster();"
FAULTS = {
    "sums are read before all warps left theirs": [("narrow.cuh", SYNC, "leave(sum, i);")],
    "one buffer for the sums of warps": [
        ("narrow.cuh", "((i & 1) * C::WARPS + warp)", "warp"),
        ("narrow.cuh", "LOCAL + (i & 1) * C::WARPS * STEP", "LOCAL"),
    ],
    "one buffer for the sums of blocks": [
        ("narrow.cuh", "(slot * C::CLUSTER + rank) * STEP", "rank * STEP"),
        ("narrow.cuh", "SENT + slot * C::CLUSTER * STEP", "SENT"),
    ],
    "what other blocks send is not awaited": [("narrow.cuh", AWAIT, "")],
    "what other blocks send is awaited as if from here": [
        ("narrow.cuh", AWAIT, AWAIT.replace("_cluster", ""))
    ],
    "the wrong phase is awaited": [("narrow.cuh", AWAIT, AWAIT.replace("r / 2", "r"))],
    "a barrier is not armed again": [("narrow.cuh", ARM, "")],
    "others may go on before a strip is finished": [
        (
            "narrow.cuh",
            "if (i) finish(i / C::CLUSTER - 1);\n        arrive_cluster();",
            "arrive_cluster();\n        if (i) finish(i / C::CLUSTER - 1);",
        )
    ],
    "blocks end before others have sent to them": [
        ("narrow.cuh", LAST, LAST.replace("wait_cluster();", ""))
    ],
    "x is read before the wait": [("narrow.cuh", "wait_for_launches();", "")],
    "a piece is not awaited": [("stream.cuh", "await(full + 8 * tail, phase);", "")],
    "the place of a piece is filled before it is read": [
        ("narrow.cuh", "ring.take(w);\n          ask();", "ask();\n          ring.take(w);")
    ],
    "the last strip has another width": [("epilogue.cuh", "n + j < N", "n + j <= N")],
}

QUICK = {
    "sums are read before all warps left theirs", "one buffer for the sums of warps",
    "what other blocks send is not awaited", "a barrier is not armed again",
    "x is read before the wait", "the place of a piece is filled before it is read",
}  # fmt: skip
FOUND = {  # how, where that is sure
    "what other blocks send is awaited as if from here": "at the scope of this block",
    "x is read before the wait": "read before the wait",
    "a barrier is not armed again": "all wait for what does not come",
}


def tried(program: Program, i: int, one: Case, schedules: range = SCHEDULES) -> None:
    check(one, program(i, one.arrays, schedules))


@pytest.fixture(scope="module")
def cases():
    return [case(form, f"form{i}", i) for i, form in enumerate(FORMS.values())]


@pytest.fixture(scope="module")
def program(cases, tmp_path_factory):
    return Program(tmp_path_factory.mktemp("narrow"), [c.kernel for c in cases])


@pytest.mark.parametrize("i", range(len(FORMS)), ids=list(FORMS))
def test_forms_are_what_float64_says_in_every_order(cases, program, i):
    tried(program, i, cases[i])


def test_other_weights_are_found(cases, program):
    """A sum without one of its terms is beyond what may be, so the comparison can fail."""
    for i, one in enumerate(cases):
        w = one.w.copy()
        k = int(np.argmax(np.abs(one.arrays["x"][0].astype(np.float64))))
        w[k] = 0
        with pytest.raises(AssertionError, match="off by"):
            tried(program, i, Case(one.kernel, one.arrays, w, one.constants), range(1))


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAULTS]
)
def test_seeded_faults_are_caught(fault, tmp_path):
    one = case(TRIED, "form")
    program = Program(tmp_path, [one.kernel], FAULTS[fault])
    caught = None
    for schedule in range(48):  # one at a time: most faults show in the first
        try:
            tried(program, 0, one, range(schedule, schedule + 1))
        except (RefusedError, AssertionError) as error:
            caught = str(error)
            break
    assert caught is not None
    assert FOUND.get(fault, "") in caught, caught


def drawn(rng: random.Random) -> Form:
    """A form that the division takes."""
    while True:
        gated, integers = rng.random() < 0.3, rng.random() < 0.4
        residual = not gated and rng.random() < 0.5
        options = {
            "dtype": rng.choice(["f16", "f16", "bf16"]), "integers": integers,
            "source": rng.choice(["f32", "half", "norm"]), "bias": rng.random() < 0.5,
            "epilogue": "gated" if gated else "residual" if residual else "none",
            "activation": rng.choice(["silu", "gelu"]),
            "out": "f32" if residual else rng.choice(["f32", "half"]),
            "squares": not gated and rng.random() < 0.5,
        }  # fmt: skip
        n = rng.choice([1, 3, 31, 32, 33, 63, 64, 65, 97, 100, 160, 259, 300, 420, 500])
        form = Form(
            rng.randint(1, 16), 8 * rng.randint(29, 260), n + n % 2 if gated else n,
            rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 2]), rng.choice(["sm_90", "sm_120"]),
            rng.choice([0, 0, 0, 1]) if n < 100 else 0, options,
            rng.choice([None, 16]) if integers else None,
        )  # fmt: skip
        try:
            form.kernel("form")
        except PccError:
            continue
        return form


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_drawn_forms(seed, tmp_path):
    rng = random.Random(seed)
    drawings = [drawn(rng) for _ in range(10)]
    cases = [case(form, f"form{i}", seed) for i, form in enumerate(drawings)]
    program = Program(tmp_path, [c.kernel for c in cases])
    for i, one in enumerate(cases):
        try:
            tried(program, i, one, range(12))
        except (RefusedError, AssertionError) as error:
            raise AssertionError(f"{drawings[i]}: {error}") from error
