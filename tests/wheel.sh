#!/usr/bin/env bash
# Build the wheel, install it in a fresh environment, run the tests marked `wheel` outside the
# checkout. Dependencies come from .venv; its editable pcc does not, because a plain path line in
# a .pth file does not run the .pth files of the folder it names.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$root/.venv/bin/python
unset PYTEST_ADDOPTS PYTHONPATH
if [ -z "${PCC_SHARED:-}" ] && [ -d ../shared ]; then
    PCC_SHARED=$(cd ../shared && pwd)
    export PCC_SHARED
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From a copy: a stale build/ folder would put deleted modules into the wheel.
mkdir "$work/source"
for name in pyproject.toml README.md LICENSE pcc passes backends; do
    [ ! -e "$name" ] || cp -a "$name" "$work/source/"
done
"$python" -m pip wheel -qq --no-deps -w "$work" "$work/source"

"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" install -qq --no-deps "$work"/pcc-*.whl
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/dependencies.pth"

mkdir "$work/outside"
cp -a tests pyproject.toml "$work/outside/"
cd "$work/outside"
"$work/venv/bin/python" - "$site" <<'PY'
import sys
from pathlib import Path

import pcc
import pcc.backends.onnx
import pcc.passes

site = Path(sys.argv[1]).resolve()
for module in (pcc, pcc.passes, pcc.backends.onnx):
    if not Path(module.__file__).resolve().is_relative_to(site):
        sys.exit(f"{module.__name__} comes from {module.__file__}, not from the wheel")
PY

mapfile -t files < <(grep -rlE 'mark\.wheel\b' --include='test_*.py' tests)
"$work/venv/bin/python" -P -m pytest -q -p no:cacheprovider -m 'wheel and not slow' "${files[@]}"
