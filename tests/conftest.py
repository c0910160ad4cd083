"""What every test may use: the shared data, where they exist; the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from shipped import Arena, Command

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))  # `import strategies` in any test


def find_shared(path: str) -> Path:
    """Return `path` inside the shared folder (PCC_SHARED, or beside the checkout), or skip."""
    found = Path(os.environ.get("PCC_SHARED") or ROOT.parent / "shared") / path
    if not found.exists():
        pytest.skip(f"shared folder missing: {path}")
    return found


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("oracle/head")` is that folder; the test skips where it is absent."""
    return find_shared


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command("inspect", path)` calls `pcc` in this process."""
    from shipped import Command

    return Command(capsys, monkeypatch)


@pytest.fixture
def arena(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Arena:
    """Commands that must fail, in an empty folder."""
    from shipped import Arena

    monkeypatch.chdir(tmp_path)
    return Arena(tmp_path, command)
