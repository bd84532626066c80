"""LoRA training over several devices, started by `consilium-node train --external` through torchrun.

Reads the CONSILIUM_* variables that `consilium-node` sets, shards the base model over all processes (FSDP2) and leaves a
PEFT folder in CONSILIUM_OUTPUT. Runs on CUDA devices, or on CPUs with gloo.
"""

import contextlib
import json
import math
import os
import pathlib
import random

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

WARMUP = 0.05  # share of the steps on which the learning rate rises
FLOOR = 0.02  # learning rate at the end, as a share of the highest


def setting(name):
    return os.environ["CONSILIUM_" + name]


def texts(paths):
    """The text of every record: JSON lines with `text`, `prompt`/`completion` or `context`/`target`, or one record a line."""
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            with open(file, encoding="utf-8") as lines:
                for line in lines:
                    line = line.rstrip("\n")
                    if file.suffix not in (".jsonl", ".json"):
                        yield line
                    elif line:
                        record = json.loads(line)
                        keys = ("text",), ("prompt", "completion"), ("context", "target")
                        yield "".join(next([record.get(k, "") for k in ks] for ks in keys if ks[-1] in record))


def packed_rows(base, paths, length):
    """Token ids of all records, each with an end, cut into rows of `length`."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    end = json.loads((base / "config.json").read_text())["eos_token_id"]
    end = end[0] if isinstance(end, list) else end
    ids = [end]
    for text in texts(paths):
        ids += tokenizer.encode(text, add_special_tokens=False).ids + [end]
    rows = [ids[i : i + length] for i in range(0, len(ids) - 1, length)]
    rows[-1] = (rows[-1] + ids * length)[:length]
    return rows


def rate_at(step, steps, highest):
    """Linear rise, then a cosine."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return highest * (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return highest * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))


def sharded_model(base, device, mesh, seed):
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    torch.manual_seed(seed)  # the same fresh factors in every process
    config = LoraConfig(
        r=int(setting("RANK")),
        lora_alpha=float(setting("ALPHA")),
        target_modules=setting("TARGET_MODULES").split(","),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    model = get_peft_model(model, config).to(device)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, config


def save(model, config, output):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        factors = get_peft_model_state_dict(model, state_dict=state)
        factors = {name: value.float().contiguous() for name, value in factors.items()}
        save_file(factors, output / "adapter_model.safetensors", metadata={"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(output)


def main():
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (world,))
    base = pathlib.Path(setting("BASE_MODEL"))
    model, config = sharded_model(base, device, mesh, int(setting("SEED")))
    paths = [pathlib.Path(path) for path in setting("DATA").split(":")]
    rows = packed_rows(base, paths, int(setting("ROW_TOKENS")))
    steps, highest = int(setting("STEPS")), float(setting("LEARNING_RATE"))
    per_process = max(1, int(setting("ROWS")) // world)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=highest, weight_decay=0.0)
    order = random.Random(int(setting("SEED")))  # every process draws the same order and takes its own part
    model.train()
    for step in range(steps):
        chosen = [order.randrange(len(rows)) for _ in range(per_process * world)][rank::world]
        batch = torch.tensor([rows[index] for index in chosen], device=device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, steps, highest)
        optimiser.step()
        optimiser.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    save(model, config, pathlib.Path(setting("OUTPUT")))
    dist.barrier()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
