"""An output head and a loss in torch: logits, loss and gradient of the hidden states, and of the weights where the head is
trained; the gradient of the logits is written over them. All rows at once: two large products are faster than many small ones.
"""

import torch

from trie_loss import trie_loss
from twin import serve
from vocabulary import read

K = 32


def prepare(words):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, path, width = words[0], words[1], int(words[2])
    tokens, text = read(path)
    rows, size = len(text) + 1, len(tokens) + 1
    hidden = torch.randn(rows, width)
    weights = torch.randn(size, width) / 32
    loss = tokens_loss(rows, size) if name == "tokens" else trie_loss(tokens, text)
    grad = torch.zeros(size, width) if words[3] == "trained" else None

    def run():
        z = hidden @ weights.T
        total = loss(z)
        if grad is not None:
            grad.addmm_(z.T, hidden)
        return total, z @ weights

    return run


def tokens_loss(rows, size):
    ids = torch.stack([torch.randperm(size)[:K] for _ in range(rows)])
    q = torch.softmax(torch.randn(rows, K + 1) * 2, -1)
    listed, tail = q[:, :K], q[:, K:]

    def in_place(z):
        log_total = torch.logsumexp(z, -1, keepdim=True)
        log_p = z.gather(1, ids) - log_total
        p = log_p.exp()
        ghost = (1 - p.sum(-1, keepdim=True)).clamp_min(1e-9)
        loss = -(listed * log_p).sum() - (tail * ghost.log()).sum()
        z.sub_(log_total).exp_().mul_(1 - tail / ghost)
        z.scatter_(1, ids, p - listed)
        return loss

    return in_place


serve(prepare)
