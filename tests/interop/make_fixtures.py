#!/usr/bin/env python3
"""Makes the parity fixtures of the decoder: tiny random models and what transformers and peft compute with them.

    python3 -m venv .venv && .venv/bin/pip install torch transformers peft safetensors
    .venv/bin/python tests/interop/make_fixtures.py node/tests/fixtures

Each family gets a folder with config.json, model.safetensors, a LoRA adapter (with embeddings and head saved whole)
and expected.safetensors: `ids` [1, T], `logits` [1, T, V] of the model and `adapted` [1, T, V] with the adapter.
"""
import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZE = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, rms_norm_eps=1e-6)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(tie_word_embeddings=False, **SIZE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(tie_word_embeddings=True, rope_theta=1_000_000.0, **SIZE)),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model, kinds):
    """Gives parameters that start at one or zero, and copies of others, values that matter."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(kind in name for kind in kinds):
                tensor.add_(torch.randn_like(tensor) * 0.1)


def make(root, family):
    torch.manual_seed(7)
    kind, config = FAMILIES[family]
    folder = root / family
    model = kind(config).eval()
    randomise(model, ["norm", "bias"])
    model.save_pretrained(folder)
    ids = torch.randint(0, SIZE["vocab_size"], (1, 20))
    with torch.no_grad():
        logits = model(ids).logits
    saved = ["embed_tokens", "lm_head"] if not config.tie_word_embeddings else None
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, modules_to_save=saved,
                                               task_type="CAUSAL_LM")).eval()
    randomise(adapted, ["lora_B", "modules_to_save"])
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with torch.no_grad():
        after = adapted(ids).logits
    save_file({"ids": ids, "logits": logits.contiguous(), "adapted": after.contiguous()}, folder / "expected.safetensors")
    config_file = folder / "adapter" / "adapter_config.json"
    text = json.loads(config_file.read_text())
    text["base_model_name_or_path"] = family
    text["target_modules"] = sorted(text["target_modules"])
    config_file.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    for name in FAMILIES:
        make(target, name)
