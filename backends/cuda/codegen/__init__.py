"""Kernels generated from groups of Tensor IR nodes."""

from pcc.backends.cuda.codegen.generate import Generated, generate

__all__ = ["Generated", "generate"]
