#!/usr/bin/env bash
# The decoder against Python transformers and peft, live and in both directions: logits, gradients of one step, adapters
# and whole models. Makes a virtual environment with them from PyPI (torch is a download of some gigabytes) unless
# CONSILIUM_INTEROP_PYTHON names a Python that has them.
#
#     tests/interop/models.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -z ${CONSILIUM_INTEROP_PYTHON:-} ]]; then
  python3 -m venv target/interop-models
  target/interop-models/bin/pip install --quiet torch transformers==5.23.0 peft==0.21.2 safetensors jinja2
  export CONSILIUM_INTEROP_PYTHON=$PWD/target/interop-models/bin/python
fi
cargo test --locked -p consilium-node --test parity -- --include-ignored --nocapture
"$CONSILIUM_INTEROP_PYTHON" tests/interop/make_chat.py target/interop-chat.json 2>/dev/null
cmp target/interop-chat.json node/tests/fixtures/chat.json && echo "the fixture of chat templates is what this transformers renders"
