"""Machine code is compiled once for one compiler, options, headers and source."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcc.backends.cuda.cache import VARIABLE, Cache
from pcc.errors import PccError


def tool(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


def test_code_is_made_once_for_what_decides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, made = tmp_path / "kernels", list[str]()
    headers.mkdir()
    (headers / "a.cuh").write_text("one")
    nvcc = tool(tmp_path / "nvcc", "13.0")

    def get(source: str, options: tuple[str, ...] = ("sm_90",)) -> bytes:
        def make() -> bytes:
            made.append(source)
            return source.upper().encode()

        return Cache(nvcc, options, headers).get(source, make)

    monkeypatch.delenv(VARIABLE, raising=False)
    assert get("x") == get("x") == b"X"
    assert len(made) == 2  # nothing is kept unless a folder is named
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    assert get("x") == get("x") == b"X"
    assert len(made) == 3
    get("y")
    get("x", ("sm_80",))
    (headers / "a.cuh").write_text("two")
    get("x")
    tool(nvcc, "13.1")
    get("x")
    assert len(made) == 7
    assert len(list((tmp_path / "cache").iterdir())) == 5  # nothing half-written is left


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.raises(PccError, match="X404"):
        Cache(tool(tmp_path / "nvcc", "1"), (), tmp_path).get("x", lambda: b"")
