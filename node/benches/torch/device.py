"""The step of `benches/device.rs` with transformers and peft: prints the seconds of its median."""

import argparse
import os
import time
import warnings

warnings.filterwarnings("ignore")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

WARM = 3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBERS = ["width", "layers", "heads", "kv-heads", "inner", "vocabulary", "rank", "rows", "length", "steps", "matrix"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--checkpoint", action="store_true")
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def build(args):
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=args.inner, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False)
    torch.set_default_dtype(torch.bfloat16 if args.device == "cuda" else torch.float32)
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    # Factors in the type of the base, the faster of peft's two ways.
    model = get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=MODULES, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    model.train()
    if args.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(args.device)


def main():
    args = arguments()
    torch.manual_seed(0)
    model = build(args)
    ids = torch.randint(1, args.vocabulary, (args.rows, args.length), device=args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 1e-4, fused=True)

    def wait():
        if args.device == "cuda":
            torch.cuda.synchronize()

    def step():
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()

    times = []
    for _ in range(WARM + args.steps):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    times = sorted(times[WARM:])
    print(times[len(times) // 2])


main()
