#!/usr/bin/env bash
# Installs servers for the tests that run them: `servers` LitServe and `transformers serve` (OpenAI's
# protocol), `llama` llama.cpp's server, which is compiled, `mlserver` MLServer and KServe's client.
#
# The last two have environments of their own: both need a protobuf older than Ray's, and different FastAPIs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=.$1
[[ -e $target/installed ]] && exit

install() { # into an environment: what
  "${PYTHON:-python3}" -m venv "$target/$1"
  "$target/$1/bin/python" -m pip install -q "${@:2}"
}
rm -rf "$target"
if [[ $1 == mlserver ]]; then
  install server 'mlserver==1.7.*' &
  install client 'kserve==0.21.*'
  wait $!
elif [[ $1 == llama ]]; then
  install . 'llama-cpp-python[server]==0.3.*' gguf
else
  install . 'litserve==0.2.*' 'transformers[serving]==5.*' torch
fi
touch "$target/installed"
