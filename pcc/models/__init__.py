"""Verifiers: language models as Tensor IR, read from folders of plain data."""
