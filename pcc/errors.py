"""Diagnostics: one exception type with a stable code, a place, a cause and a remedy."""

from __future__ import annotations


class PccError(Exception):
    """A user-facing error: a stable code, one sentence, where it is, and what to do about it.

    Codes beginning with ``X`` say that the environment lacks something (exit code 3); all others
    say that the input is bad (exit code 2).
    """

    def __init__(self, code: str, what: str, *, at: str = "", hint: str = "") -> None:
        self.code, self.what, self.at, self.hint = code, what, at, hint
        head = f"{at}: error[{code}]: {what}" if at else f"error[{code}]: {what}"
        super().__init__(f"{head}\n  help: {hint}" if hint else head)

    @property
    def exit_code(self) -> int:
        """Return the process exit code for this error (2 bad input, 3 environment)."""
        return 3 if self.code.startswith("X") else 2
