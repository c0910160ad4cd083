"""Tensor IR to ONNX models."""
