#!/usr/bin/env bash
# Installs MLServer and KServe's client into .mlserver/, for the tests that run them.
#
# Each has an environment of its own: both need a protobuf older than Ray's, and different FastAPIs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
target=.mlserver
[[ -e $target/installed ]] && exit

install() { # into an environment: what
  "$python" -m venv "$target/$1"
  "$target/$1/bin/python" -m pip install -q "$2"
}
rm -rf "$target"
install server 'mlserver==1.7.*' &
install client 'kserve==0.21.*'
wait $!
touch "$target/installed"
