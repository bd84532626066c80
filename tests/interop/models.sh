#!/usr/bin/env bash
# The decoder against Python transformers and peft, live and in both directions: logits, gradients of one step, adapters
# and whole models. python.sh makes the Python environment.
#
#     tests/interop/models.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

CONSILIUM_INTEROP_PYTHON=$(tests/interop/python.sh)
export CONSILIUM_INTEROP_PYTHON
cargo test --locked --workspace --test parity -- --include-ignored --nocapture
mkdir -p target/interop
"$CONSILIUM_INTEROP_PYTHON" tests/interop/make_chat.py target/interop/chat.json
cmp target/interop/chat.json node/tests/fixtures/chat.json
echo "the fixture of chat templates is what this transformers renders"
