"""CUDA source to machine code: nvcc, one process for each graph, in a temporary folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pcc.backends.cuda.cache import Cache
from pcc.errors import PccError

LIMIT = 900.0  # seconds that one graph may take; the largest takes a tenth of it on a quiet machine
SHOWN = 2000  # characters of the compiler's complaint
KERNELS = Path(__file__).with_name("kernels")
OPTIONS = ("-O3", "-std=c++17", "--cubin")


def find() -> Path:
    """Return the path of nvcc. Errors: X401."""
    homes = (os.environ.get(k) for k in ("CUDA_HOME", "CUDA_PATH"))
    places = [str(Path(h) / "bin") for h in homes if h]
    path = os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    found = shutil.which("nvcc", path=path)
    if found is None:
        what = "the CUDA compiler nvcc was not found: target 'cuda' compiles its kernels with it"
        hint = "install the CUDA toolkit (nvcc) and put it on PATH, or set CUDA_HOME to its folder"
        raise PccError("X401", what, hint=hint)
    return Path(found)


def check_listed(nvcc: Path, arch: str) -> None:
    """Refuse an architecture that this compiler does not know, before anything is lowered: E180.

    A compiler that lists none says so when it compiles (X403).
    """
    call = [str(nvcc), "--list-gpu-code"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    listed = re.findall(r"^sm_\d+[af]?$", done.stdout, re.MULTILINE)
    if listed and arch not in listed and arch.rstrip("af") not in listed:
        what = f"this nvcc does not compile for {arch}"
        known = sorted(listed, key=lambda x: int(re.sub(r"\D", "", x)))
        raise PccError("E180", what, at=str(nvcc), hint=f"it knows {', '.join(known)[:200]}")


def compile_all(
    sources: Mapping[str, str], arch: str, say: Callable[[str], None] = lambda _: None
) -> dict[str, bytes]:
    """Return the machine code of each source. Equal sources are compiled once. Errors: X401-X404.

    Sources may include the library's headers (`linear.cuh` and the others).
    """
    nvcc = find()
    names = {digest(s): name for name, s in sources.items()}
    jobs = {key: sources[name] for key, name in names.items()}
    workers = min(len(jobs), os.cpu_count() or 1) or 1
    cache = Cache(nvcc, (arch, *OPTIONS), KERNELS)
    with tempfile.TemporaryDirectory(prefix="pcc-nvcc-") as folder:

        def one(key: str) -> bytes:
            begun = time.perf_counter()
            at, source, name = Path(folder) / key, jobs[key], names[key]
            code = cache.get(source, lambda: _compile(nvcc, at, source, arch, name))
            say(f"kernels of '{name}' compiled in {time.perf_counter() - begun:.0f} s")
            return code

        with ThreadPoolExecutor(workers) as pool:
            made = dict(zip(jobs, pool.map(one, jobs), strict=True))
    return {name: made[digest(source)] for name, source in sources.items()}


def digest(source: str) -> str:
    """Return the SHA-256 of a source text."""
    return hashlib.sha256(source.encode()).hexdigest()


def _compile(nvcc: Path, stem: Path, source: str, arch: str, name: str) -> bytes:
    text, code = stem.with_suffix(".cu"), stem.with_suffix(".cubin")
    text.write_text(source, encoding="utf-8")
    call = [str(nvcc), f"-arch={arch}", *OPTIONS, f"-I{KERNELS}", text.name, "-o", code.name]
    try:
        done = subprocess.run(
            call, cwd=stem.parent, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        what = f"nvcc took more than {LIMIT:.0f} s for graph '{name}'"
        raise PccError("X402", what, hint="compile on a machine that is less busy") from None
    except OSError as e:
        what = f"nvcc cannot be run: {e}"
        raise PccError("X401", what, at=str(nvcc), hint="repair the CUDA toolkit") from None
    if done.returncode:
        what = f"nvcc refuses the kernels of graph '{name}': {done.stderr.strip()[:SHOWN]}"
        hint = (
            "CUDA 12.1 or later with a C++17 host compiler is needed; pcc doctor shows what is here"
        )
        raise PccError("X403", what, hint=hint)
    return code.read_bytes()
