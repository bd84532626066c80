"""A frozen output head and KL on listed tokens in torch: logits, loss and gradient of the hidden states, the gradient of the
logits written over them. All rows at once: two large products are faster than many small ones."""

import torch

from twin import serve


def prepare(words):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, size, width, k = map(int, words)
    hidden = torch.randn(rows, width)
    weights = torch.randn(size, width) / 32
    ids = torch.stack([torch.randperm(size)[:k] for _ in range(rows)])
    q = torch.softmax(torch.randn(rows, k + 1) * 2, -1)
    listed, tail = q[:, :k], q[:, k:]

    def run():
        z = hidden @ weights.T
        log_total = torch.logsumexp(z, -1, keepdim=True)
        log_p = z.gather(1, ids) - log_total
        p = log_p.exp()
        ghost = (1 - p.sum(-1, keepdim=True)).clamp_min(1e-9)
        loss = -(listed * log_p).sum() - (tail * ghost.log()).sum()
        z.sub_(log_total).exp_().mul_(1 - tail / ghost)
        z.scatter_(1, ids, p - listed)
        return loss, z @ weights

    return run


serve(prepare)
