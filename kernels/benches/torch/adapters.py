"""Merging 8 adapters, flat values, in numpy and torch."""

import numpy as np
import torch

from twin import serve

torch.set_num_threads(1)
ADAPTERS, DENSITY = 8, 0.2
CHUNK = 1 << 20


def chunks(values):
    return (slice(at, at + CHUNK) for at in range(0, values.shape[1], CHUNK))


def torch_case(case, x):
    out = torch.empty(x.shape[1])

    def fedavg():
        out.zero_()
        for row in x:
            out.add_(row, alpha=1 / ADAPTERS)

    def median():
        for at in chunks(x):
            torch.mean(x[:, at].sort(0).values[3:5], 0, out=out[at])

    def trimmed():
        for at in chunks(x):
            torch.mean(x[:, at].sort(0).values[1:-1], 0, out=out[at])

    def ties():
        keep = int(x.shape[1] * (1 - DENSITY))
        limits = torch.stack([torch.kthvalue(row.abs(), keep).values for row in x])[:, None]
        for at in chunks(x):
            part = x[:, at]
            part = torch.where(part.abs() > limits, part, 0.0)
            same = torch.sign(part) == torch.sign(part.sum(0))
            out[at] = (part * same).sum(0) / (same & (part != 0)).sum(0).clamp_min(1)

    return {"fedavg": fedavg, "median": median, "trimmed": trimmed, "ties": ties}[case]


def numpy_case(case, x):
    out = np.empty(x.shape[1], np.float32)

    def fedavg():
        out[:] = 0
        for row in x:
            np.add(out, row * np.float32(1 / ADAPTERS), out=out)

    def median():
        for at in chunks(x):
            out[at] = np.median(x[:, at], 0)

    def trimmed():
        for at in chunks(x):
            out[at] = np.sort(x[:, at], 0)[1:-1].mean(0)

    def ties():
        keep = int(x.shape[1] * (1 - DENSITY))
        limits = np.stack([np.partition(np.abs(row), keep)[keep] for row in x])[:, None]
        for at in chunks(x):
            part = x[:, at]
            part = np.where(np.abs(part) >= limits, part, 0)
            same = np.sign(part) == np.sign(part.sum(0))
            out[at] = (part * same).sum(0) / np.maximum((same & (part != 0)).sum(0), 1)

    return {"fedavg": fedavg, "median": median, "trimmed": trimmed, "ties": ties}[case]


def prepare(words):
    library, case, count = words[0], words[1], int(words[2])
    x = np.random.default_rng(0).standard_normal((ADAPTERS, count), np.float32) * np.float32(0.02)
    return numpy_case(case, x) if library == "numpy" else torch_case(case, torch.from_numpy(x))


serve(prepare)
