#!/usr/bin/env bash
# Installs NVIDIA's Triton server into .triton/, for the tests that run it (it needs no GPU).
#
# The wheel of pytriton carries the server and a backend that runs models in Python. Its stub, a
# Python of its own, needs numpy 1; both stay outside .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
target=.triton
[[ -e $target/installed ]] && exit
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')

rm -rf "$target"
"$python" -m pip install -q --no-deps --target "$target" 'nvidia-pytriton==0.7.*'
"$python" -m pip install -q --target "$target/numpy" --only-binary :all: 'numpy<2'
server=$target/pytriton/tritonserver
stub=$server/python_backend_stubs/$version/triton_python_backend_stub
cp "$stub" "$server/backends/python/"
if missing=$(LD_LIBRARY_PATH=$libraries ldd "$stub" | grep 'not found'); then
  echo "error: Triton's Python lacks:$missing" >&2
  exit 1
fi
echo "$libraries" >"$target/installed"
