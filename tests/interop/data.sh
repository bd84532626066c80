#!/usr/bin/env bash
# Training data written by pyarrow and events read by TensorBoard: trains on the Parquet files and compares what TensorBoard's
# reader finds with what the program said. Installs both from PyPI under target/.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=target/interop-data/bin/python
[[ -x $python ]] || python3 -m venv target/interop-data
$python -m pip install -q pyarrow tensorboard
$python tests/interop/read_tensorboard.py --golden

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
$python tests/interop/make_parquet.py "$work/data"
rm "$work"/data/{bad_rows,numbers,nested_numbers,no_roles}.parquet
cat > "$work/train.toml" <<'END'
output = "model"
rows = 4
row_tokens = 64
held_out = 0.1
evaluate_every = 5
[new]
vocabulary = 300
hidden_size = 32
layers = 1
heads = 2
intermediate_size = 48
[[stages]]
text = ["data"]
steps = 20
learning_rate = 3e-3
END
cargo run -q --locked --bin consilium-node -- --json train "$work/train.toml" > "$work/said"
$python - "$work" <<'END'
import json, pathlib, struct, sys
sys.path.insert(0, "tests/interop")
from read_tensorboard import scalars
work = pathlib.Path(sys.argv[1])
said = [json.loads(line) for line in open(work / "said")]
narrow = lambda value: struct.unpack("f", struct.pack("f", value))[0]
want = {("train/loss", e["step"]): narrow(e["loss_nats"]) for e in said if e.get("event") == "step"}
want |= {("held_out/loss", e["step"]): narrow(e["held_out_loss_nats"]) for e in said if e.get("event") == "evaluated"}
found = {(tag, step): value for tag, step, _, value in scalars(work / "runs/model") if tag.endswith("/loss")}
assert found == want and len(want) == 24, (found, want)
assert said[0]["counts"]["records"] == 1800, said[0]
print("trained on", said[0]["counts"]["records"], "records of pyarrow's;", len(found), "scalars read by TensorBoard")
END
