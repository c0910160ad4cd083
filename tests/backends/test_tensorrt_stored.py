"""What an engine stores in half precision, by what 8.6 says of the engines it builds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from fake_tensorrt import stand_in
from onnx import TensorProto, helper

import pcc
from pcc.backends.tensorrt import borders
from pcc.backends.tensorrt.build import Builder
from pcc.backends.tensorrt.precision import types_of
from pcc.backends.tensorrt.runtimes import RUNTIMES
from pcc.backends.tensorrt.stored import check_stored
from pcc.conformance.verifiers import KINDS
from pcc.errors import PccError

HALF, WHOLE = "Row major linear FP16 format", "Row major linear FP32"
JSON = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON=0))


def graph() -> ir.Model:
    """Context -> half -> product -> float, reshaped -> softmax q; sum of q and u, moved."""
    one, two = TensorProto.FLOAT, TensorProto.FLOAT16
    value, node = helper.make_tensor_value_info, helper.make_node
    nodes = [
        node("Reshape", ["context", "flat"], ["row"]), node("Cast", ["row"], ["h"], to=two),
        node("MatMul", ["h", "w"], ["z"]), node("Cast", ["z"], ["scores"], to=one),
        node("Reshape", ["scores", "flat"], ["logits"]), node("Softmax", ["logits"], ["q"]),
        node("Add", ["q", "u"], ["sum"]), node("Reshape", ["sum", "flat"], ["moved"]),
    ]  # fmt: skip
    inner = [value("row", one, [1, 4]), value("h", two, [1, 4]), value("z", two, [1, 4]),
             value("scores", one, [1, 4]), value("logits", one, [1, 4]),
             value("sum", one, [1, 4])]  # fmt: skip
    made = helper.make_graph(
        nodes, "g", [value("context", one, [1, 4]), value("u", one, [1, 4])],
        [value("q", one, [1, 4]), value("moved", one, [1, 4])],
        [helper.make_tensor("flat", TensorProto.INT64, [2], [1, 4]),
         helper.make_tensor("w", two, [4, 4], [0.5] * 16)], value_info=inner,
    )  # fmt: skip
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)]))


def tensor(name: str, kind: str) -> dict[str, str]:
    return {"Name": name, "Format/Datatype": kind}


def engine(*layers: Any) -> Any:
    """An engine of which an inspector says this."""
    said = json.dumps({"Layers": [*layers, "a layer of which nothing is known"]})
    inspector = SimpleNamespace(get_engine_information=lambda _: said)
    return SimpleNamespace(create_engine_inspector=lambda: inspector)


def block(ins: dict[str, str], outs: dict[str, str]) -> dict[str, Any]:
    sides = {"Inputs": ins, "Outputs": outs}
    found = {k: [tensor(*x) for x in side.items()] for k, side in sides.items()}
    return {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", **found}


def conversion(a: str, of: str, b: str, to: str) -> dict[str, Any]:
    return {"Name": "Reformatting CopyNode", "LayerType": "Reformat",
            "Inputs": [tensor(a, of)], "Outputs": [tensor(b, to)]}  # fmt: skip


def names(*layers: Any) -> str:
    """What is refused, or noted, or nothing."""
    model = graph()
    try:
        notes = check_stored(engine(*layers), model, types_of(model), JSON)
    except PccError as e:
        return f"{e.code} {e.what.split(': ')[1]}"
    return "; ".join(f"note {n.split(': ')[2]}" for n in notes)


def test_what_a_conversion_halves_is_found_by_the_tensor_it_stands_for() -> None:
    """As 8.6 built the draft of an HMM: u, the context and q itself crossed a border as halves."""
    u, c, q = (f"Reformatted {x} Tensor {i} to {{ForeignNode[a...b]}}"
               for x, i in (("Input", 0), ("Input", 1), ("Output", 0)))  # fmt: skip
    into = conversion("u", WHOLE, u, HALF), conversion("context", WHOLE, c, HALF)
    out = conversion(q, HALF, "q", WHOLE)
    # The context is nothing but rounded to half by the graph itself.
    assert names(*into, block({u: HALF, c: HALF}, {q: HALF}), out) == "E439 'q', 'u'"
    assert names(into[1], block({"u": WHOLE, c: HALF}, {"q": WHOLE})) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [("sum", "note"), ("q", "E439"), ("u", "E439"), ("moved", "E439"),
     *((x, "") for x in ("logits", "scores", "row", "h", "z", "w", "what nobody knows"))],
)  # fmt: skip
def test_tensors_between_blocks(name: str, said: str) -> None:
    """Floats that come from halves, or are read as halves only, lose nothing."""
    found = names(block({}, {name: HALF}), block({name: HALF}, {}))
    assert found == (f"{said} '{name}'" if said else "")
    assert names(block({}, {name: WHOLE}), block({name: WHOLE}, {})) == ""


def test_tensors_of_every_profile_are_looked_at() -> None:
    q = "Reformatted Output Tensor 0 to {ForeignNode[a...b]} [profile 1]"
    out = conversion(q, HALF, "q [profile 1]", WHOLE) | {"LayerType": "MyelinReformat"}
    assert names(block({"u [profile 2]": HALF}, {q: HALF}), out) == "E439 'q', 'u'"


def test_what_a_name_says_is_not_what_a_tensor_is() -> None:
    model = graph()
    types = types_of(model) | {"in Half, FP16": "FLOAT"}
    assert check_stored(engine(block({}, {"in Half, FP16": WHOLE})), model, types, JSON) == []


@pytest.mark.parametrize("text", ["", "null", "{}", "[]", '{"Layers": 3}'])
def test_an_engine_that_tells_nothing_is_refused(text: str) -> None:
    inspector = SimpleNamespace(get_engine_information=lambda _: text)
    made = SimpleNamespace(create_engine_inspector=lambda: inspector)
    with pytest.raises(PccError, match="E435"):
        check_stored(made, graph(), {}, JSON)


def test_what_the_parser_adds_has_the_type_that_it_was_given() -> None:
    model = graph()
    for kind, count in (("FLOAT", 1), ("HALF", 0)):
        types = types_of(model) | {"(parser's own)": kind}
        made = engine(block({}, {"(parser's own)": HALF}))
        assert len(check_stored(made, model, types, JSON)) == count


def test_many_names_are_not_all_said() -> None:
    types = {f"t{i}": "FLOAT" for i in range(9)}
    (note,) = check_stored(engine(block({}, dict.fromkeys(types, HALF))), graph(), types, JSON)
    assert note.endswith("'t4' and 4 more")


MODULE = SimpleNamespace(
    TensorFormat=SimpleNamespace(LINEAR=0), BuilderFlag=SimpleNamespace(DIRECT_IO="direct"),
)  # fmt: skip


def configuration() -> Any:
    flags: list[str] = []
    return SimpleNamespace(flags=flags, set_flag=flags.append, clear_flag=flags.remove)


def network(*kinds: str) -> Any:
    tensors = [SimpleNamespace(allowed_formats=0, dtype=SimpleNamespace(name=k)) for k in kinds]
    return SimpleNamespace(num_inputs=2, num_outputs=len(kinds) - 2, tensors=tensors,
                           get_input=lambda i: tensors[i],
                           get_output=lambda i: tensors[2 + i])  # fmt: skip


def test_floats_are_not_to_be_converted_where_they_enter_or_leave() -> None:
    config, plain = configuration(), network("FLOAT", "INT32", "FLOAT", "BOOL")
    borders.keep(plain, config, MODULE)
    assert config.flags == ["direct"]
    assert [x.allowed_formats for x in plain.tensors] == [1, 0, 1, 0]


@pytest.mark.parametrize("kinds", [("FLOAT", "HALF", "FLOAT"), ("HALF", "INT32", "HALF")])
def test_borders_with_halves_are_left_as_they_are(kinds: tuple[str, ...]) -> None:
    config, mixed = configuration(), network(*kinds)
    borders.keep(mixed, config, MODULE)
    assert config.flags == []
    assert {x.allowed_formats for x in mixed.tensors} == {0}


def builder(plans: list[Any], said: list[list[tuple[str, str]]]) -> Builder:
    """A builder that gives these plans, one after the other."""
    made = object.__new__(Builder)
    made.module = MODULE
    made.builder = SimpleNamespace(build_serialized_network=lambda n, c: plans.pop(0))
    made.messages = SimpleNamespace(take=lambda: said.pop(0))  # type: ignore[assignment]
    return made


def test_what_cannot_be_kept_is_built_without_and_looked_into() -> None:
    """As 8.6 says where no block conforms; other refusals are not tried again."""
    said = "4: BuilderFlag::kDIRECT_IO specified but no conformant implementation exists"
    config = configuration()
    made = builder([None, b"plan"], [[("ERROR", said)], []])
    borders.keep(network("FLOAT", "FLOAT"), config, MODULE)
    plan, (note,) = made._planned(None, config)
    assert (plan, note[0]) == (b"plan", "NOTE")
    assert config.flags == []
    made = builder([None], [[("ERROR", "10: no implementation")]])
    assert made._planned(None, configuration()) == (None, [("ERROR", "10: no implementation")])


@pytest.mark.parametrize(
    ("precision", "verifies", "warned"),
    [("fp16", True, True), ("fp32", True, False), ("fp16", False, False)],
)
def test_a_verifier_in_half_precision_is_doubted_before_it_is_built(
    tmp_path: Path, monkeypatch: Any, precision: str, *, verifies: bool, warned: bool
) -> None:
    old, said = RUNTIMES["8.6"], list[str]()

    def stop(*_: Any, **__: Any) -> None:
        raise PccError("E000", "what is said before is enough")

    stand_in(monkeypatch, old, tmp_path / "m.pcc")
    monkeypatch.setattr("pcc.backends.tensorrt.write.engines_of", stop)
    source, model = KINDS["llama"](tmp_path)
    with pytest.raises(PccError, match="E000"):
        pcc.compile(
            source, verifier=model if verifies else None, out=tmp_path / "m.pcc", validate=False,
            target="tensorrt", precision=precision, queries=["draft"], progress=said.append,
        )  # fmt: skip
    assert any("E439" in line for line in said) == warned
