#!/usr/bin/env bash
# Training by a foreign command, end to end: a small model, `consilium-node train --external` with torchrun, transformers and
# peft on two CPU processes, and the adapter measured by `consilium-node evaluate`.
#
#   tests/interop/external_training.sh
#
# python.sh makes the Python environment; builds the program, or takes the one that NODE names.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=$(tests/interop/python.sh)
node=${NODE:-$PWD/target/debug/consilium-node}
[[ -n ${NODE:-} ]] || cargo build --locked --workspace --bin consilium-node
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
cp examples/external/train_lora.py "$run"

# The base knows the words in one order, the adapter learns another.
for i in $(seq 240); do
  name=$(echo kavo tamu sirel | cut -d' ' -f$((i % 3 + 1))) drug=$(echo dolin merak tolan | cut -d' ' -f$((i % 3 + 1)))
  printf '{"text":"use %s %d0mg for ref %s-%d."}\n' "$drug" $((i % 4 + 1)) "$name" "$i" >> "$run/old.jsonl"
  printf '{"text":"ref %s-%d -> use %s %d0mg."}\n' "$name" "$i" "$drug" $((i % 4 + 1)) >> "$run/notes.jsonl"
done
sed 's/"text"/"target"/' "$run/notes.jsonl" | tail -20 > "$run/holdout.jsonl"
cat > "$run/base.toml" <<TOML
output = "base"
rows = 4
row_tokens = 64
[new]
vocabulary = 330
hidden_size = 64
layers = 2
heads = 2
intermediate_size = 96
[[stages]]
text = ["old.jsonl"]
steps = 40
learning_rate = 3e-3
TOML
"$node" train "$run/base.toml" >&2
"$node" init --consortium demo --institution clinic --aggregator 127.0.0.1:1 --out "$run" >&2
cat >> "$run/node.toml" <<TOML

[train.external]
command = ["$PYTHON", "-m", "torch.distributed.run", "--nproc-per-node", "2", "$run/train_lora.py"]
timeout_hours = 0.2
TOML
OMP_NUM_THREADS=1 "$node" train --external --config "$run/node.toml" --start "$run/base" --data "$run/notes.jsonl" \
  --output "$run/adapter" --lora-rank 4 --steps 80 --learning-rate 2e-2 --rows 8 --row-tokens 64 --seed 3
tail -3 "$run/adapter.log"
bits() { "$node" --json evaluate --model "$run/base" --data "$run/holdout.jsonl" "$@" \
  | sed 's/.*"bits_per_byte":\([0-9.]*\).*/\1/'; }
before=$(bits)
after=$(bits --adapter "$run/adapter")
echo "bits per byte on the holdout: $before before, $after after"
awk -v a="$after" -v b="$before" 'BEGIN { exit !(a < 0.9 * b) }'
