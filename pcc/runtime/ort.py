"""ONNX Runtime sessions: the provider that was asked for, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcc.bundle import RUNTIME_OF_OPSET
from pcc.errors import PccError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_ort() -> Any:
    """Import onnxruntime or say how to get it."""
    try:
        import onnxruntime
    except ImportError:
        raise PccError(
            "X201", "onnxruntime is not installed", hint="pip install 'pcc[cpu]' (or 'pcc[gpu]')"
        ) from None
    return onnxruntime


def version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version."""
    return tuple(int(p) for p in text.split(".")[:2] if p.isdigit())


def check_opset(opset: int) -> None:
    """Refuse an opset that the installed ONNX Runtime lacks."""
    have = import_ort().__version__
    need = RUNTIME_OF_OPSET.get(opset)
    if need is None or version(have) < version(need):
        known = f"it needs ONNX Runtime {need}" if need else "no ONNX Runtime known to pcc has it"
        raise PccError(
            "B220",
            f"the graphs use opset {opset}; {known}, installed is {have}",
            hint="upgrade onnxruntime, or compile with --opset 17",
        )


def open_session(path: Path, provider: str, threads: int | None) -> Any:
    """Open a model; a provider that silently falls back to another is an error."""
    ort = import_ort()
    if provider not in PROVIDERS:
        raise PccError(
            "X202",
            f"provider {provider!r} is not built yet",
            hint=f"available: {', '.join(PROVIDERS)}",
        )
    want = PROVIDERS[provider]
    if want not in ort.get_available_providers():
        raise PccError(
            "X202",
            f"this onnxruntime has no {want}",
            hint="pip install 'pcc[gpu]' in an environment without 'pcc[cpu]'",
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = ort.InferenceSession(str(path), options, providers=[want])
    except Exception as e:  # onnxruntime raises its own types, none of them exported
        raise PccError(
            "B221", f"onnxruntime refuses the graph: {str(e).splitlines()[0][:200]}", at=str(path)
        ) from None
    if session.get_providers()[0] != want:
        raise PccError(
            "X203",
            f"asked for {want}, got {session.get_providers()[0]}",
            hint="check the GPU driver and CUDA libraries with `pcc doctor`",
        )
    return session
