#!/usr/bin/env bash
# Installs MLServer and KServe's client into .mlserver/, for the tests that run them.
#
# Each has an environment of its own: both need a protobuf older than Ray's, and different FastAPIs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
target=.mlserver
[[ -e $target/installed ]] && exit

rm -rf "$target"
"$python" -m venv "$target/server"
"$target/server/bin/python" -m pip install -q 'mlserver==1.7.*'
"$python" -m venv "$target/client"
"$target/client/bin/python" -m pip install -q 'kserve==0.21.*'
touch "$target/installed"
