"""ONNX Runtime sessions: the provider that was asked for, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcc.bundle import RUNTIME_OF_OPSET
from pcc.errors import PccError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
KNOWN = (*PROVIDERS, "tensorrt")


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


def check_provider(provider: str, kind: str = "onnx") -> str:
    """Return ONNX Runtime's name of a provider, which must be there; "" where it is not asked.

    `kind` is the format of the graphs: only "onnx" needs ONNX Runtime.
    """
    if not isinstance(provider, str) or provider not in KNOWN:
        hint = f"one of {', '.join(KNOWN)}"
        raise PccError("R108", f"unknown provider {provider!r}", hint=hint)
    if kind != "onnx" or provider not in PROVIDERS:
        return ""
    want = PROVIDERS[provider]
    if want not in import_ort().get_available_providers():
        hint = "uninstall onnxruntime, then pip install 'pcc[gpu]': both use one folder"
        raise PccError("X202", f"this onnxruntime has no {want}", hint=hint)
    return want


def own_bytes() -> int:
    """Return the memory of this process that no file backs; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(s.split()[1]) << 10 for s in lines if s.startswith("RssAnon"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def open_session(path: Path, provider: str, threads: int | None) -> Any:
    """Open a model; a provider that silently falls back to another is an error."""
    ort, want = import_ort(), check_provider(provider)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    before = own_bytes()
    try:
        session = ort.InferenceSession(str(path), options, providers=[want])
    except Exception as e:  # onnxruntime raises its own types, none of them exported
        what = f"onnxruntime refuses the graph: {first_line(e)}"
        raise PccError("B221", what, at=str(path)) from None
    got = session.get_providers()[0]
    if got != want:
        hint = "check the GPU driver and CUDA libraries with `pcc doctor`"
        raise PccError("X203", f"asked for {want}, got {got}", hint=hint)
    session.disable_fallback()  # nor later, when a run fails
    session.opening_bytes = max(0, own_bytes() - before)  # prepacked copies of weights, mostly
    return session


def answer(session: Any, outputs: list[str], feed: dict[str, Any], at: str) -> list[Any]:
    """Run a session. What it refuses now is a graph that does not fit its manifest, or memory."""
    try:
        return list(session.run(outputs, feed))
    except Exception as e:  # onnxruntime raises its own types, none of them exported
        what = f"onnxruntime cannot run the graph: {first_line(e)}"
        raise PccError("B222", what, at=at) from None


def first_line(e: Exception) -> str:
    """Return the first line of a message, not too long."""
    return (str(e).splitlines() or [type(e).__name__])[0][:200]
