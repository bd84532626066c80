#!/usr/bin/env python3
"""Twin of the fused head of benches/cuda.rs: a bf16 head, loss in float, gradient of the hidden states.

The loss is cross-entropy plus a sparse KL against 16 tokens per row. Prints the median of seven synchronised runs.
"""

import time

import torch
import torch.nn.functional as F

SIZE, WIDTH, SLOTS = 151_936, 4096, 16


def loss_of(hidden, weights, labels, ids, shares):
    logits = F.linear(hidden, weights).float()
    log_p = F.log_softmax(logits, dim=-1)
    nll = -log_p.gather(1, labels[:, None]).sum()
    kl = -(shares * log_p.gather(1, ids)).sum()
    return 1e-3 * (nll + kl)


def main():
    device = "cuda"
    torch.manual_seed(0)
    weights = (torch.randn(SIZE, WIDTH, device=device) * 0.01).bfloat16()
    for count in (1024, 8192):
        hidden = torch.randn(count, WIDTH, device=device).bfloat16().requires_grad_()
        labels = torch.randint(SIZE, (count,), device=device)
        ids = torch.randint(SIZE, (count, SLOTS), device=device)
        shares = torch.rand(count, SLOTS, device=device)
        shares /= shares.sum(-1, keepdim=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = []
        for _ in range(9):
            hidden.grad = None
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss_of(hidden, weights, labels, ids, shares).backward()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds = sorted(times[2:])[3]
        work = 4.0 * count * SIZE * WIDTH
        scratch = (torch.cuda.max_memory_allocated() - before) >> 20
        print(f"torch head                bf16 V={SIZE} d={WIDTH} P={count:5} {seconds * 1e3:9.3f} ms "
              f"{work / seconds / 1e12:6.1f} TFLOP/s, scratch {scratch} MiB", flush=True)


if __name__ == "__main__":
    main()
