"""Tensor ops: arrays with a dtype, a per-row shape and maybe a batch axis; none knows about scopes.

The ops that circuits are lowered to, by one name: `from pcc.tensor import ops as t`.
"""

from __future__ import annotations

from pcc.tensor.arithmetic import (
    Add,
    And,
    Binary,
    Cast,
    Div,
    Equal,
    Exp,
    Less,
    Log,
    LogSoftmax,
    Mul,
    Normalisation,
    Not,
    Or,
    Softmax,
    Sub,
    Unary,
    Where,
)
from pcc.tensor.core import LOWEST, NUMBERS, Const, Input, TensorOp
from pcc.tensor.lookups import (
    ArgMax,
    Column,
    FloorDiv,
    InverseCdf,
    Lookup,
    Remainder,
    SelectRow,
    Trajectory,
)
from pcc.tensor.movement import Concat, Expand, Reshape, Take, Transpose
from pcc.tensor.reductions import (
    Contract,
    CumProd,
    Cumsum,
    LogContract,
    MaxContract,
    ReduceLse,
    ReduceMax,
    ReduceProd,
    ReduceSum,
    Reduction,
    ScaledContract,
)

__all__ = [
    "LOWEST", "NUMBERS", "Add", "And", "ArgMax", "Binary", "Cast", "Column", "Concat", "Const",
    "Contract", "CumProd", "Cumsum", "Div", "Equal", "Exp", "Expand", "FloorDiv", "Input",
    "InverseCdf", "Less", "Log", "LogContract", "LogSoftmax", "Lookup", "MaxContract", "Mul",
    "Normalisation", "Not", "Or", "ReduceLse", "ReduceMax", "ReduceProd", "ReduceSum",
    "Reduction", "Remainder", "Reshape", "ScaledContract", "SelectRow", "Softmax", "Sub", "Take",
    "TensorOp", "Trajectory", "Transpose", "Unary", "Where",
]  # fmt: skip
