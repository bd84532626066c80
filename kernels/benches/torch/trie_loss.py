"""The trie loss plus cross-entropy in torch, with the closed-form gradient written over the logits: one softmax, one running
sum in f64, masses gathered at the borders of trie nodes; the gradient's factor per column is spread by another running sum.
Index tables are prepared once.
"""

import torch

from vocabulary import Trie


def trie_loss(tokens, text):
    """A function that overwrites logits `[len(text) + 1, len(tokens) + 1]` by their gradient and returns the loss."""
    rows, size = len(text) + 1, len(tokens) + 1
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

    def in_place(z):
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

    return in_place
