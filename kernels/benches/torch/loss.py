"""The losses in torch, forward and backward, with the closed-form gradient written over the logits where that is faster than
autograd (it is: no log-softmax is kept).

`tokens` is KL on 32 listed tokens and a ghost bucket for the rest; `trie` is in `trie_loss.py`. `sorted` is the distance of the
32 largest probabilities and the rest from a sorted target; `standardised` is InfiFusion's on the 10 largest logits, plus
cross-entropy, half of each.
"""

import torch

from twin import serve
from trie_loss import trie_loss
from vocabulary import read


def prepare(words):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, path = words
    tokens, text = read(path)
    size, rows = len(tokens) + 1, len(text) + 1
    z = torch.randn(rows, size) * 2.5
    if name == "trie":
        loss, fresh = trie_loss(tokens, text), copies(z)
        return lambda: loss(fresh())
    make = {"tokens": tokens_loss, "sorted": sorted_loss, "standardised": standardised_loss}
    return make[name](z, tokens, text)


def copies(z):
    """Fresh logits for every repetition, made outside the timing."""
    pool = [z.clone() for _ in range(9)]
    return lambda: pool.pop() if pool else z.clone()


def tokens_loss(z, tokens, text):
    rows, size = z.shape
    k = 32
    ids = torch.stack([torch.randperm(size)[:k] for _ in range(rows)])
    q = torch.softmax(torch.randn(rows, k + 1) * 2, -1)
    listed, tail = q[:, :k], q[:, k:]
    fresh = copies(z)

    def run():
        z = fresh()
        at = z.gather(1, ids)
        log_total = torch.logsumexp(z, -1, keepdim=True)
        log_p = at - log_total
        p = log_p.exp()
        ghost = (1 - p.sum(-1, keepdim=True)).clamp_min(1e-9)
        loss = -(listed * log_p).sum() - (tail * ghost.log()).sum()
        z.sub_(log_total).exp_().mul_(1 - tail / ghost)
        z.scatter_(1, ids, p - listed)
        return loss

    return run


def sorted_loss(z, tokens, text):
    k = 32
    q = torch.softmax(torch.randn(len(z), k + 1) * 2, -1)
    listed, rest = q[:, :k].sort(-1, descending=True).values, q[:, k:]
    fresh = copies(z)

    def run():
        z = fresh()
        top, ids = torch.topk(z, k, -1)
        log_total = torch.logsumexp(z, -1, keepdim=True)
        p = (top - log_total).exp()
        other = 1 - p.sum(-1, keepdim=True)
        off, off_rest = p - listed, other - rest
        loss = off.abs().sum() + off_rest.abs().sum()
        s, s_rest = off.sign(), off_rest.sign()
        pull = (p * s).sum(-1, keepdim=True) + other * s_rest
        z.sub_(log_total).exp_().mul_(s_rest - pull)
        z.scatter_(1, ids, p * (s - pull))
        return loss

    return run


def standardised_loss(z, tokens, text):
    k = 10
    labels = torch.tensor(list(text) + [z.shape[1] - 1])[:, None]

    def standard(values):
        deviation = values.std(-1, correction=0, keepdim=True)
        scores = (values - values.mean(-1, keepdim=True)) / (deviation + 1e-3)
        return scores, deviation, torch.softmax(scores, -1)

    target = standard(torch.randn(len(z), k).mul(2.5).sort(-1, descending=True).values)[2]
    fresh = copies(z)

    def run():
        z = fresh()
        top, ids = torch.topk(z, k, -1)
        log_total = torch.logsumexp(z, -1, keepdim=True)
        observed = z.gather(1, labels) - log_total
        scores, deviation, p = standard(top)
        off = p - target
        loss = 0.5 * off.abs().sum() - 0.5 * observed.sum()
        s = off.sign()
        slope = p * (s - (p * s).sum(-1, keepdim=True))
        spread = (slope * scores).mean(-1, keepdim=True) / deviation
        slope = (slope - slope.mean(-1, keepdim=True)) / (deviation + 1e-3) - scores * spread
        z.sub_(log_total).exp_().mul_(0.5)
        z.scatter_add_(1, labels, torch.full_like(observed, -0.5))
        z.scatter_add_(1, ids, 0.5 * slope)
        return loss

    return run


serve(prepare)
