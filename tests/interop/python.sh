#!/usr/bin/env bash
# Prints the Python of the interop suites: that of a virtual environment below target/ that has requirements.txt from PyPI,
# made at the first call, or the one that CONSILIUM_INTEROP_PYTHON names.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -n ${CONSILIUM_INTEROP_PYTHON:-} ]]; then
  echo "$CONSILIUM_INTEROP_PYTHON"
  exit
fi
venv=$PWD/target/interop/venv
if ! [[ -x $venv/bin/pip ]]; then
  python3 -m venv "$venv" >&2 || {
    echo "python3 cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
    exit 1
  }
fi
"$venv/bin/pip" install --quiet -r tests/interop/requirements.txt >&2
echo "$venv/bin/python"
