#!/usr/bin/env python3
"""Judges what the decoder wrote: adapters load in peft, models in transformers, and both give the logits it gave.

    .venv/bin/python tests/interop/check_ours.py FOLDER

`node/tests/parity.rs` writes FOLDER/FAMILY/ours.
"""
import json
import pathlib
import sys

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import torch

BOUND = 1e-4


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def difference(model, ids, expected):
    with torch.no_grad():
        return (model(ids).logits[0] - expected).abs().max().item()


def check(folder):
    ids = load_file(folder / "expected.safetensors")["ids"]
    expected = load_file(folder / "ours/logits.safetensors")["logits"]
    adapted = PeftModel.from_pretrained(load(folder), folder / "ours/adapter").eval()
    assert set(adapted.peft_config["default"].target_modules), folder
    rows = {"adapter": difference(adapted, ids, expected), "folded": difference(load(folder / "ours/model"), ids, expected)}
    print(folder.name, json.dumps(rows))
    return all(value <= BOUND for value in rows.values())


if __name__ == "__main__":
    folders = [path.parent for path in sorted(pathlib.Path(sys.argv[1]).glob("*/ours"))]
    assert folders, "nothing was written"
    if not all([check(folder) for folder in folders]):
        sys.exit(f"a difference is above {BOUND}")
