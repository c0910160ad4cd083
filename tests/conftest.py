"""What every test may use: the shared data, where they exist."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
