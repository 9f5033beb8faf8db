#!/usr/bin/env bash
# Runs on a VM: makes the project's environment.
#
# In: the project that this file is in. Out: `.venv` with the project and JAX for TPU, and the folder `data`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
retry_seconds=${SETUP_RETRY_SECONDS:-10}
tools=$HOME/.local/share/jax_extract

again() { # COMMAND: three times at most; sixteen VMs ask the same package registry at once
  local try
  for try in 1 2 3; do
    "$@" && return
    ((try == 3)) || sleep "$retry_seconds"
  done
  return 1
}

new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_environment() {
  local python
  for python in python3.12 python3.11 python3.13 python3; do
    if command -v "$python" >/dev/null && new_enough "$python"; then
      "$python" -m venv .venv
      return
    fi
  done
  # The VM's own Python is older: uv brings one along, without root and without waiting for apt at boot.
  again python3 -m pip install --quiet --target "$tools" uv
  again "$tools/bin/uv" venv --quiet --seed --python 3.11 .venv
}

# JAX asks for it on v5e: the TPU runtime starts and stops faster.
pages=/sys/kernel/mm/transparent_hugepage/enabled
if [[ -e $pages ]]; then
  echo always | sudo -n tee "$pages" >/dev/null || echo "note: transparent huge pages stay as they are" >&2
fi
mkdir -p data
[[ -x .venv/bin/python ]] || make_environment
again .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]'
.venv/bin/jax-extract --version
