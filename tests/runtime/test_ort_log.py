"""While ONNX Runtime's log is heard, what others write to standard error is not lost."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from pcc.errors import PccError
from pcc.runtime.device.ort_cuda import watched

ENTRY = b"\x1b[0;93m2026-01-02 03:04:05.678 [W:onnxruntime:, a.cc:1 Work] a remark\x1b[m\n"


def test_only_entries_of_the_log_are_swallowed(capfd: Any) -> None:
    def work() -> int:
        other = threading.Thread(target=lambda: os.write(2, b"another thread\n"))
        other.start()
        other.join()
        os.write(2, ENTRY)
        os.write(2, b"a warning of ours\n")
        return 3

    assert watched(work, "here") == 3
    assert capfd.readouterr().err == "another thread\na warning of ours\n"


def test_what_others_write_is_passed_on_where_the_work_fails(capfd: Any) -> None:
    def work() -> None:
        os.write(2, b"before\n" + ENTRY.replace(b"a remark", b"3 Memcpy nodes are added"))

    with pytest.raises(PccError, match="Memcpy nodes") as found:
        watched(work, "here")
    assert found.value.code == "B223"
    assert capfd.readouterr().err == "before\n"


def test_threads_that_listen_at_once_leave_standard_error_as_it_was(capfd: Any) -> None:
    def listen(first: float) -> None:
        time.sleep(first)
        watched(lambda: time.sleep(0.2), "here")

    threads = [threading.Thread(target=listen, args=(0.1 * i,)) for i in range(2)]
    for x in threads:
        x.start()
    for x in threads:
        x.join()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
