"""The losses in torch, forward and backward, with the closed-form gradient written over the logits where that is faster than
autograd (it is: no log-softmax is kept).

`tokens` is KL on 32 listed tokens and a ghost bucket for the rest. `trie` is the trie loss plus cross-entropy: one softmax, one
running sum in f64, masses gathered at the borders of trie nodes; the gradient's factor per column is spread by another running
sum. Its index tables are prepared outside the timing. `sorted` is the distance of the 32 largest probabilities and the rest
from a sorted target; `standardised` is InfiFusion's on the 10 largest logits, plus cross-entropy, half of each.
"""

import torch

from twin import serve
from vocabulary import Trie, read


def prepare(words):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, path = words
    tokens, text = read(path)
    size, rows = len(tokens) + 1, len(text) + 1
    z = torch.randn(rows, size) * 2.5
    make = {"tokens": tokens_loss, "trie": trie_loss, "sorted": sorted_loss, "standardised": standardised_loss}
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


def trie_loss(z, tokens, text):
    rows, size = z.shape
    trie = Trie(tokens)
    # A class: row, from, to, group; a group: row, from, to. The root lists 16 bytes and the end, and has a ghost.
    group, cls, cls_group, ghosts = [], [], [], []
    known = {}
    for row in range(rows):
        spelled = tokens[text[row]] if row < len(text) else b""
        for taken in range(len(spelled) + 1):
            prefix = spelled[:taken]
            if prefix not in known:
                known[prefix] = trie.children(prefix)
            children = known[prefix]
            if taken and taken == len(spelled) and not children:
                continue
            start, stop, end = trie.ranges[prefix]
            group.append((row, start, end if taken else size))
            listed = [(a, b) for byte, a, b in children if taken == 0 and byte in b" etaoinshrdlucmf" or taken and len(children) <= 16 or taken and byte % 2]
            listed = listed[:16] + [(start, stop) if taken else (size - 1, size)]
            for a, b in listed:
                if b > a:
                    cls.append((row, a, b))
                    cls_group.append(len(group) - 1)
            ghosts.append(taken == 0)
        a = text[row] if row < len(text) else size - 1
        group.append((row, 0, size)), ghosts.append(False)
        cls.append((row, a, a + 1)), cls_group.append(len(group) - 1)
    group, cls, cls_group = torch.tensor(group), torch.tensor(cls), torch.tensor(cls_group)
    ghosts = torch.tensor(ghosts, dtype=torch.float64)
    share = torch.rand(len(cls), dtype=torch.float64)
    sums = torch.zeros(len(group), dtype=torch.float64).index_add_(0, cls_group, share)
    ghost_share = 0.05 * ghosts
    share = share / sums[cls_group] * (1 - ghost_share)[cls_group]
    width = size + 1
    g_at, c_at = group[:, 0] * width, cls[:, 0] * width
    fresh = copies(z)

    def run():
        z = fresh()
        torch.softmax(z, -1, out=z)
        sums = torch.zeros(rows, width, dtype=torch.float64)
        torch.cumsum(z, -1, dtype=torch.float64, out=sums[:, 1:])
        flat = sums.view(-1)
        total = flat[g_at + group[:, 2]] - flat[g_at + group[:, 1]]
        mass = flat[c_at + cls[:, 2]] - flat[c_at + cls[:, 1]]
        in_classes = torch.zeros(len(group), dtype=torch.float64).index_add_(0, cls_group, mass)
        rest = (total - in_classes).clamp_min(1e-12)
        loss = -(share * (mass / total[cls_group]).log()).sum() - (ghost_share * (rest / total).log()).sum()
        pull = ghost_share / rest
        factor = torch.zeros(rows, width)
        f = factor.view(-1)
        whole = (1 / total - pull).float()
        f.index_add_(0, g_at + group[:, 1], whole)
        f.index_add_(0, g_at + group[:, 2], -whole)
        part = (share / mass - pull[cls_group]).float()
        f.index_add_(0, c_at + cls[:, 1], -part)
        f.index_add_(0, c_at + cls[:, 2], part)
        torch.cumsum(factor, -1, out=factor)
        z.mul_(factor[:, :size])
        return loss

    return run


serve(prepare)
