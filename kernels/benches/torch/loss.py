"""The losses in torch, forward and backward, with the closed-form gradient written over the logits where that is faster than
autograd (it is: no log-softmax is kept).

`tokens` is KL on 32 listed tokens and a ghost bucket for the rest; `trie` is in `trie_loss.py`.
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
    if name == "tokens":
        return tokens_loss(z)
    loss, fresh = trie_loss(tokens, text), copies(z)
    return lambda: loss(fresh())


def copies(z):
    """Fresh logits for every repetition, made outside the timing."""
    pool = [z.clone() for _ in range(9)]
    return lambda: pool.pop() if pool else z.clone()


def tokens_loss(z):
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


serve(prepare)
