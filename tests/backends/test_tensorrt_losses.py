"""What a TensorRT would lose or ignore is refused: wide floats, messages, options."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import pcc
from pcc.backends.tensorrt.legal import check_build, check_messages, check_model
from pcc.backends.tensorrt.library import LOST, MESSAGES, Messages, messages
from pcc.backends.tensorrt.options import BuildOptions
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.errors import PccError
from pcc.frontends import templates

OLD, RTX = RUNTIMES["8.6"], RUNTIMES["rtx"]
WIDE = numpy_helper.from_array(np.array([1.0, 1e-17, 3.0, 4.0]), "d")
node = helper.make_node


def graph(
    nodes: list[Any], initializers: tuple[Any, ...] = (), dtype: int = TensorProto.FLOAT
) -> ir.Model:
    ends = [helper.make_tensor_value_info(n, dtype, [1, 4]) for n in "xy"]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(initializers))
    opsets = [helper.make_opsetid("", 24)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))


def branch(name: str, nodes: list[Any], initializers: tuple[Any, ...] = ()) -> Any:
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])]
    return helper.make_graph(nodes, name, [], out, list(initializers))


FLOAT = TensorProto.FLOAT
FLOAT64 = {
    "sum of constants": ([node("Add", ["d", "d"], ["s"]), node("Cast", ["s"], ["c"], to=FLOAT),
                          node("Add", ["c", "x"], ["y"])], (WIDE,)),
    "type of a constant": ([node("CastLike", ["x", "d"], ["s"]),
                            node("Cast", ["s"], ["y"], to=FLOAT)], (WIDE,)),
    "constant node": ([node("Constant", [], ["d"], value=WIDE),
                       node("CastLike", ["x", "d"], ["s"]),
                       node("Cast", ["s"], ["y"], to=FLOAT)], ()),
    "cast": ([node("Cast", ["x"], ["s"], to=TensorProto.DOUBLE),
              node("Cast", ["s"], ["y"], to=FLOAT)], ()),
    "identity matrix": ([node("EyeLike", ["x"], ["s"], dtype=TensorProto.DOUBLE),
                         node("Cast", ["s"], ["y"], to=FLOAT)], ()),
    "filled": ([node("Shape", ["x"], ["n"]),
                node("ConstantOfShape", ["n"], ["s"],
                     value=numpy_helper.from_array(np.array([0.1]))),
                node("Cast", ["s"], ["y"], to=FLOAT)], ()),
    "branch": ([node("ReduceMax", ["x"], ["m"], keepdims=0), node("Cast", ["m"], ["b"], to=9),
                node("If", ["b"], ["y"],
                     then_branch=branch("p", [node("Cast", ["d"], ["p"], to=FLOAT)], (WIDE,)),
                     else_branch=branch("q", [node("Identity", ["x"], ["q"])]))], ()),
}  # fmt: skip


@pytest.mark.parametrize("r", [OLD, RTX], ids=lambda r: r.name)
@pytest.mark.parametrize("kind", FLOAT64)
def test_float64_within_a_graph_is_refused(kind: str, r: Any) -> None:
    with pytest.raises(PccError, match="float64 in float32") as found:
        check_model(graph(*FLOAT64[kind]), r)
    assert found.value.code == "E431"


@pytest.mark.parametrize("op", ["RMSNormalization", "LayerNormalization"])
@pytest.mark.parametrize("stash", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_norms_are_summed_in_float32(op: str, stash: int) -> None:
    scale = numpy_helper.from_array(np.ones(4, np.float16), "w")

    def norm(**more: Any) -> ir.Model:
        return graph([node(op, ["x", "w"], ["y"], **more)], (scale,), TensorProto.FLOAT16)

    check_model(norm(), RTX)
    check_model(norm(stash_type=FLOAT), RTX)
    with pytest.raises(PccError, match=f"stash_type={stash} of {op}") as found:
        check_model(norm(stash_type=stash), RTX)
    assert found.value.code == "E431"


# ---------------------------------------------------------------- messages


def test_equal_messages_are_kept_once_and_lost_ones_are_an_error() -> None:
    said = Messages()
    for _ in range(3 * MESSAGES):
        said.add("WARNING", "Make sure input x has Int64 binding.")
    check_messages(said.take(), RTX)  # repeated for every node, and harmless
    for i in range(MESSAGES + 1):
        said.add("WARNING", f"Make sure input x{i} has Int64 binding.")
    lost = said.take()
    assert lost[-1] == ("ERROR", LOST)
    for check in (check_messages, check_build):
        with pytest.raises(PccError, match="the rest is lost") as found:
            check(lost, RTX)
        assert found.value.code == "E433"
    assert said.take() == []


def test_a_logger_reports_that_messages_are_lost() -> None:
    class Logger:
        Severity = SimpleNamespace(WARNING=2)

    module: Any = ModuleType("stand_in_of_a_talkative_parser")
    module.ILogger = Logger
    kept = messages(module)
    for i in range(MESSAGES + 5):
        kept.logger.log(2, f"remark {i}")
        kept.logger.log(3, "information")
    assert len(kept.take()) == MESSAGES + 1
    assert not kept.take()


@pytest.mark.parametrize(
    ("name", "text", "passes"),
    [
        ("10", "Detected finite FP32 values which would overflow in FP16 and converted them to "
         "the closest finite FP16 value.", False),
        ("8.6", "Detected finite FP32 values which would overflow in FP16 and converted them to "
         "the closest finite FP16 value.", True),  # for candidates; what is chosen is pinned
        ("8.6", "Running layernorm after self-attention in FP16 may cause overflow.", False),
        ("10", "Detected values less than smallest positive FP16 subnormal value and converted "
         "them to the FP16 minimum subnormalized value.", False),
        ("8.6", "Skipping tactic 0 due to insufficient memory on requested size of 5.", True),
        ("rtx", "setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX.", False),
        ("rtx", "Make sure input x has Int64 binding.", True),
    ],
)  # fmt: skip
def test_what_a_builder_says_of_numbers_is_an_error(name: str, text: str, passes: bool) -> None:
    if passes:
        check_build([("WARNING", text)], RUNTIMES[name])
        return
    with pytest.raises(PccError) as found:
        check_build([("WARNING", text)], RUNTIMES[name])
    assert found.value.code == "E433"


@pytest.mark.parametrize(
    "text",
    ["Unused Input: x", "/src/a.cpp:7: Unused Input: x", "[RemoveDeadLayers] Input Tensor x is "
     "unused or used only at compile-time, but is not being removed."],
)  # fmt: skip
def test_an_input_may_be_unused_where_the_graph_does_not_read_it(text: str) -> None:
    check_build([("WARNING", text)], RTX, {"x", "y"})
    for unread in ({"y"}, set[str]()):
        with pytest.raises(PccError) as found:
            check_build([("WARNING", text)], RTX, unread)
        assert found.value.code == "E433"


def test_a_build_that_warns_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from pcc.backends.tensorrt.build import Builder

    model = graph([node("Neg", ["x"], ["y"])])
    path = tmp_path / "g.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    builder = Builder(RTX, BuildOptions())
    assert builder.build(model, path).said == []
    make = builder.builder.build_serialized_network

    def warns(network: Any, config: Any) -> Any:
        config.hardware_compatibility_level = builder.module.HardwareCompatibilityLevel.AMPERE_PLUS
        return make(network, config)

    builder.builder = SimpleNamespace(
        create_network=builder.builder.create_network,
        create_builder_config=builder.builder.create_builder_config,
        build_serialized_network=warns,
    )
    with pytest.raises(PccError, match="unsupported in TensorRT-RTX") as found:
        builder.build(model, path)
    assert found.value.code == "E433"


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given", "says", "takes"),
    [
        ({"level": 9}, "level='9'", "0 to 5"),
        ({"refit": "often"}, "refit='often'", "refit_identical"),
        ({"workspace": 5}, "workspace='5'", "1048576 bytes"),
        ({"workspace": 1 << 70}, "workspace=", "1048576 bytes"),
        ({"hardware": "any"}, "hardware='any'", "none, ampere_plus, same"),
        ({"capability": "../9"}, "capability='../9'", "like 8.9"),
    ],
)
def test_an_option_out_of_range_is_named(given: dict[str, Any], says: str, takes: str) -> None:
    with pytest.raises(PccError, match=says) as found:
        BuildOptions.of(given).check(RUNTIMES["10"])
    assert found.value.code == "E430"
    assert takes in found.value.hint
    assert "BuildOptions(" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "takes"),
    [("8.6", {"ampere_plus"}), ("10", {"ampere_plus", "same"}), ("11", {"ampere_plus", "same"}),
     ("rtx", set())],
)  # fmt: skip
def test_compatibility_levels_are_those_of_the_runtime(name: str, takes: set[str]) -> None:
    r = RUNTIMES[name]
    assert set(r.hardware) == takes
    BuildOptions().check(r)
    for level in ("ampere_plus", "same"):
        if level in takes:
            BuildOptions(hardware=level).check(r)
            continue
        with pytest.raises(PccError, match=f"TensorRT {name} takes no hardware='{level}'"):
            BuildOptions(hardware=level).check(r)


def test_options_that_a_runtime_would_ignore_are_refused() -> None:
    for r, given, name in (
        (OLD, {"capability": "9.0"}, "capability"), (RTX, {"timings": "timing.cache"}, "timings"),
        (RTX, {"strip": True, "refit": "refit"}, "refit"), (OLD, {"strip": True}, "strip"),
    ):  # fmt: skip
        with pytest.raises(PccError, match=f"TensorRT {r.name} has no option {name}") as found:
            BuildOptions.of(given).check(r)
        assert found.value.code == "E430"
        assert name not in found.value.hint
    BuildOptions(capability="12.0").check(RTX)
    BuildOptions(timings="timing.cache").check(OLD)


@pytest.mark.parametrize("only", ["zzz", "draft,zzz", "draft,", " ", "Draft"])
def test_engines_are_of_graphs_that_the_bundle_has(tmp_path: Path, only: str) -> None:
    out = tmp_path / "m.pcc"
    with pytest.raises(PccError, match="is no graph of this bundle") as found:
        pcc.compile(
            templates.cp(3, 2, 8, context=8, seed=0), target="tensorrt-rtx", out=out,
            queries=["draft"], validate=False, engine={"only": only},
        )  # fmt: skip
    assert found.value.code == "E430"
    assert "draft" in found.value.hint
    assert not out.exists()


def test_spaces_between_names_are_no_part_of_them() -> None:
    options = BuildOptions(only=" step , prefill")
    options.check_names(["step", "prefill", "decode"])
    assert options.builds("step")
    assert options.builds("prefill")
    assert not options.builds("decode")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-10", "tensorrt-11"])
def test_a_gpu_is_refused_where_engines_are_for_the_one_present(
    tmp_path: Path, target: str
) -> None:
    with pytest.raises(PccError, match="the GPU that is present, not for gpu='sm_89'") as found:
        pcc.compile(
            templates.cp(3, 2, 8, context=8, seed=0), target=target, out=tmp_path / "m.pcc",
            queries=["draft"], validate=False, gpu="sm_89",
        )  # fmt: skip
    assert found.value.code == "E430"
