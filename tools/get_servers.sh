#!/usr/bin/env bash
# Installs LitServe and `transformers serve` (OpenAI's protocol) into .servers/, for the tests that run them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
target=.servers
[[ -e $target/installed ]] && exit

rm -rf "$target"
"$python" -m venv "$target"
"$target/bin/python" -m pip install -q 'litserve==0.2.*' 'transformers[serving]==5.*' torch
touch "$target/installed"
