"""Tensor IR, through ONNX, to TensorRT engines."""
