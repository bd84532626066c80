#!/usr/bin/env python3
"""Makes the parity fixtures of the decoder: tiny random models and what transformers and peft compute with them.

    python3 -m venv .venv && .venv/bin/pip install torch transformers peft safetensors
    .venv/bin/python tests/interop/make_fixtures.py node/tests/fixtures [--wide] [--missing]

Each family gets a folder with config.json, model.safetensors (or shards), a PEFT adapter and expected.safetensors:
`ids` [1, T]; `logits` [1, T, V] of the model; `short` [1, S, V] of the first S tokens alone; `adapted` [1, T, V] with the
adapter; `base.NAME`, the gradient of the mean cross-entropy of the next token in every weight of the plain model; and
`lora.NAME`, that in every weight of the adapter. `--wide` makes larger models, for tests that keep nothing; `--missing`
leaves folders alone that are there.
"""
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

WIDE = "--wide" in sys.argv
SIZE = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, rms_norm_eps=1e-6,
            bos_token_id=None, eos_token_id=None, pad_token_id=None)
if WIDE:
    SIZE.update(vocab_size=48, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
                initializer_range=0.08)
TOKENS, SHORT = 20, 9
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def longrope(pairs, partial):
    return dict(rope_type="longrope", rope_theta=10_000.0, partial_rotary_factor=partial,
                short_factor=[1.25 + 0.25 * i for i in range(pairs)], long_factor=[1.5 + 1.25 * i for i in range(pairs)])


def families():
    """Class, configuration, adapter settings, type of the weights, largest shard."""
    head = SIZE["hidden_size"] // SIZE["num_attention_heads"]
    whole = ["embed_tokens", "lm_head"]
    pairs = SIZE | dict(num_attention_heads=SIZE["num_attention_heads"] // 2, num_key_value_heads=1)
    return {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(tie_word_embeddings=False, **SIZE),
                  dict(r=3, lora_alpha=6, target_modules=SEVEN, modules_to_save=whole), torch.float32, None),
        "llama3": (hf.LlamaForCausalLM, hf.LlamaConfig(tie_word_embeddings=True, rope_parameters=dict(
            rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16), **SIZE),
                   dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2},
                        alpha_pattern={"layers.1.self_attn.q_proj": 3}), torch.bfloat16, "8KB"),
        "mistral": (hf.MistralForCausalLM, hf.MistralConfig(sliding_window=7, **SIZE),
                    dict(r=2, lora_alpha=4, target_modules="all-linear"), torch.float16, None),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(tie_word_embeddings=True, rope_theta=1_000_000.0, **SIZE),
                  dict(r=3, lora_alpha=6, target_modules=SEVEN), torch.float32, None),
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(tie_word_embeddings=True, head_dim=head * 2, use_sliding_window=True,
                                                      sliding_window=6, max_window_layers=1, **SIZE),
                  dict(r=2, lora_alpha=2, target_modules=r".*layers\.\d+\.(mlp\.(gate|down)_proj|self_attn\.[qkvo]_proj)"),
                  torch.bfloat16, None),
        "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config(sliding_window=11, **SIZE),
                 dict(r=3, lora_alpha=6, target_modules=FUSED, modules_to_save=["lm_head"]), torch.bfloat16, None),
        "phi4": (hf.Phi3ForCausalLM, hf.Phi3Config(tie_word_embeddings=True, original_max_position_embeddings=12,
                                                   rope_parameters=longrope(head // 2, partial=0.5), **pairs),
                 dict(r=2, lora_alpha=4, target_modules=["qkv_proj", "down_proj"], layers_to_transform=[1]),
                 torch.float32, None),
    }


def randomise(model, kinds):
    """Gives parameters that start at one or zero, and copies of others, values that matter."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(kind in name for kind in kinds):
                tensor.add_(torch.randn_like(tensor) * 0.1)


def gradients(model, ids):
    """Of the mean cross-entropy of the next token, by name."""
    model.zero_grad()
    logits = model(ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits.contiguous()


def make(root, family):
    torch.manual_seed(7)
    kind, config, lora, dtype, shard = families()[family]
    folder = root / family
    config._attn_implementation = "eager"
    model = kind(config)
    randomise(model, ["norm", "bias"])
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    # What is compared is computed in f32 from the values that the file holds. A model that was cast has cast its rotary
    # frequencies as well, so it is read again.
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, SIZE["vocab_size"], (1, TOKENS))
    expected = {"ids": ids, "logits": logits_of(model, ids), "short": logits_of(model, ids[:, :SHORT])}
    expected |= {f"base.{name}": value for name, value in gradients(model, ids).items()}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    randomise(adapted, ["lora_B", "modules_to_save"])
    adapted.save_pretrained(folder / "adapter")
    for extra in ["adapter/README.md", "generation_config.json"]:
        (folder / extra).unlink(missing_ok=True)
    expected["adapted"] = logits_of(adapted, ids)
    expected |= {f"lora.{name}".replace(".default", "").replace(".modules_to_save", ""): value
                 for name, value in gradients(adapted, ids).items()}
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")
    config_file = folder / "adapter" / "adapter_config.json"
    text = json.loads(config_file.read_text())
    text["base_model_name_or_path"] = family
    if isinstance(text["target_modules"], list):
        text["target_modules"] = sorted(text["target_modules"])
    config_file.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    for name in families():
        if "--missing" not in sys.argv or not (target / name).exists():
            make(target, name)
