"""Make the tutorial's folders: `tutorial/text` to train on, `tutorial/held` to measure on.

    python examples/tutorial/text.py

Modules of the Python that runs this. Any other folder of text does as well: only bytes are read.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

TRAIN = (
    "ast", "base64", "bdb", "codeop", "contextlib", "dataclasses", "doctest", "enum", "fnmatch",
    "ftplib", "functools", "inspect", "locale", "mailbox", "optparse", "pdb", "pickle", "shutil",
    "socket", "subprocess", "tarfile", "threading", "traceback", "typing",
)  # fmt: skip
HELD = ("calendar", "cmd", "glob", "sched", "shelve", "textwrap")


def main() -> None:
    """Copy the modules below the working folder."""
    library = Path(sysconfig.get_path("stdlib"))
    for folder, names in (("text", TRAIN), ("held", HELD)):
        place = Path("tutorial") / folder
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(library / f"{name}.py", place / f"{name}.py")
        print(f"{place}: {sum(p.stat().st_size for p in place.iterdir())} bytes")


if __name__ == "__main__":
    main()
