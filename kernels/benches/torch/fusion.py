"""Fusion of three contributions of 16 byte slots, in numpy and torch: dense sums over bytes, the largest, codes again."""

import numpy as np
import torch

from twin import serve

torch.set_num_threads(1)
SLOTS, FILL, CHUNK = 16, 0.995, 4096
WEIGHTS = (0.61, 0.305, 0.085)
rng = np.random.default_rng(0)


def source(positions):
    """Symbols ascending, geometric masses down to half a percent, unused slots with code 255."""
    symbols = np.sort(rng.random((positions, 90)).argsort(1)[:, :SLOTS], 1).astype(np.uint8) + 32
    decay = 0.01 + 0.75 * rng.random((positions, 1)) ** 2
    masses = (1 - decay) * decay ** np.arange(SLOTS)
    used = np.cumsum(masses, 1) - masses < FILL
    masses = np.take_along_axis(masses * used, rng.random((positions, SLOTS)).argsort(1), 1)
    order = np.argsort(masses == 0, 1, kind="stable")
    symbols, masses = np.take_along_axis(symbols, order, 1), np.take_along_axis(masses, order, 1)
    last = np.take_along_axis(symbols, (masses > 0).sum(1, keepdims=True) - 1, 1)
    symbols = np.where(masses > 0, symbols, last)
    code = lambda p: np.clip(np.round(-16 * np.log2(np.maximum(p, 1e-9))), 0, 255).astype(np.uint8)
    tail = np.maximum(1 - masses.sum(1) - 0.0001, 1e-5)
    return symbols, np.where(masses > 0, code(masses), 255).astype(np.uint8), code(np.full(positions, 0.0001)), code(tail)


TABLE = np.exp2(-np.arange(256) / 16).astype(np.float32)


def shares_numpy(columns, at):
    symbols, codes, end, tail = (column[at] for column in columns)
    mass = TABLE[codes]
    mass[:, 1:][symbols[:, 1:] == symbols[:, :-1]] = 0
    end, tail = TABLE[end], TABLE[tail]
    total = mass.sum(1) + end + tail
    return symbols, mass / total[:, None], end / total, tail / total


def keep_numpy(dense, end):
    rows = np.arange(len(dense))[:, None]
    top = np.argpartition(dense, -SLOTS, 1)[:, -SLOTS:]
    top = np.take_along_axis(top, np.argsort(-dense[rows, top], 1), 1)
    mass = dense[rows, top]
    before = end[:, None] + np.cumsum(mass, 1) - mass
    kept = (before < FILL) & (mass > 0)
    kept[:, 0] = True
    mass = mass * kept
    order = np.argsort(np.where(kept, top, 256), 1)
    top, mass, kept = top[rows, order], mass[rows, order], kept[rows, order]
    last = top[rows, kept.sum(1, keepdims=True) - 1]
    code = lambda p: np.clip(np.round(-16 * np.log2(np.maximum(p, 1e-9))), 0, 255).astype(np.uint8)
    return np.where(kept, top, last).astype(np.uint8), code(mass), code(end), code(1 - end - mass.sum(1))


def dense_numpy(symbols, mass, base=0.0):
    n = len(symbols)
    index = (np.arange(n)[:, None] * 256 + symbols).ravel()
    return np.bincount(index, mass.ravel(), n * 256).reshape(n, 256)


def robust_numpy(parts, drop):
    stack, ends = [], []
    for symbols, mass, end, tail in parts:
        listed = (mass > 0).sum(1)
        dense = dense_numpy(symbols, mass)
        stack.append(np.where(dense > 0, dense, (tail / (256 - listed))[:, None]))
        ends.append(end)
    stack, ends = np.sort(np.stack(stack), 0), np.sort(np.stack(ends), 0)
    dense, end = stack[drop : len(stack) - drop].mean(0), ends[drop : len(ends) - drop].mean(0)
    total = dense.sum(1) + end
    return dense / total[:, None], end / total


def numpy_case(case, sources, positions):
    def chunk(at):
        if case == "single":
            symbols, mass, end, _ = shares_numpy(sources[0], at)
            return keep_numpy(dense_numpy(symbols, mass), end)
        parts = [shares_numpy(columns, at) for columns in sources]
        if case == "weighted":
            dense = sum(w * dense_numpy(symbols, mass) for w, (symbols, mass, _, _) in zip(WEIGHTS, parts))
            return keep_numpy(dense, sum(w * part[2] for w, part in zip(WEIGHTS, parts)))
        return keep_numpy(*robust_numpy(parts, 1))

    return lambda: [chunk(slice(at, at + CHUNK)) for at in range(0, positions, CHUNK)]


TORCH_TABLE = torch.from_numpy(TABLE)


def shares_torch(columns, at):
    symbols, codes, end, tail = (column[at] for column in columns)
    mass = TORCH_TABLE[codes.int()]
    mass[:, 1:].masked_fill_(symbols[:, 1:] == symbols[:, :-1], 0)
    end, tail = TORCH_TABLE[end.int()], TORCH_TABLE[tail.int()]
    total = mass.sum(1) + end + tail
    return symbols.long(), mass / total[:, None], end / total, tail / total


def code_torch(p):
    return p.clamp_min(1e-9).log2_().mul_(-16).round_().clamp_(0, 255).byte()


def keep_torch(dense, end):
    mass, top = torch.topk(dense, SLOTS, 1)
    kept = (end[:, None] + mass.cumsum(1) - mass < FILL) & (mass > 0)
    kept[:, 0] = True
    mass = mass * kept
    top, order = torch.where(kept, top, 256).sort(1)
    mass = mass.gather(1, order)
    last = top.gather(1, kept.sum(1, keepdim=True) - 1)
    return torch.where(top < 256, top, last).byte(), code_torch(mass), code_torch(end), code_torch(1 - end - mass.sum(1))


def robust_torch(parts, drop):
    stack = []
    for symbols, mass, end, tail in parts:
        listed = (mass > 0).sum(1)
        dense = (tail / (256 - listed))[:, None].expand(-1, 257).contiguous()
        real = torch.where(mass > 0, symbols, 256)
        dense.scatter_(1, real, mass)
        dense[:, 256] = end
        stack.append(dense)
    stack = torch.stack(stack).sort(0).values
    dense = stack[drop : len(stack) - drop].mean(0)
    dense = dense / dense.sum(1, keepdim=True)
    return dense[:, :256], dense[:, 256]


def torch_case(case, sources, positions):
    def chunk(at):
        if case == "single":
            symbols, mass, end, _ = shares_torch(sources[0], at)
            return keep_torch(torch.zeros(len(end), 256).scatter_add_(1, symbols, mass), end)
        parts = [shares_torch(columns, at) for columns in sources]
        if case == "weighted":
            dense = torch.zeros(len(parts[0][2]), 256)
            for w, (symbols, mass, _, _) in zip(WEIGHTS, parts):
                dense.scatter_add_(1, symbols, mass * w)
            return keep_torch(dense, sum(w * part[2] for w, part in zip(WEIGHTS, parts)))
        return keep_torch(*robust_torch(parts, 1))

    return lambda: [chunk(slice(at, at + CHUNK)) for at in range(0, positions, CHUNK)]


def prepare(words):
    library, case, positions = words[0], words[1], int(words[2])
    sources = [source(positions) for _ in range(3)]
    if library == "numpy":
        return numpy_case(case, sources, positions)
    return torch_case(case, [tuple(map(torch.from_numpy, columns)) for columns in sources], positions)


serve(prepare)
