"""Next-byte records in torch: one softmax and one running sum per row, then a gather at the borders of trie nodes.

Index tables are prepared outside the timing, a gift to the twin. The running sum is in f64: in f32 small masses are lost;
`torch.segment_reduce` and `index_add_` were several times slower. The calling user also wants top-16 codes, the end and the
tail, so the twin computes those, over all positions at once.
"""

import torch

from twin import serve
from vocabulary import Trie, read

K = 16


def prepare(words):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path, branches = words[0], int(words[1])
    tokens, text = read(path)
    trie = Trie(tokens)
    size, rows = len(tokens) + 1, len(text) + 1
    z = torch.randn(rows, size) * 2.5
    zb = torch.randn(branches, size) * 2.5

    root = trie.children(b"")
    root_byte = torch.tensor([byte for byte, _, _ in root])
    root_from = torch.tensor([start for _, start, _ in root])
    root_to = torch.tensor([end for _, _, end in root])
    # Interior nodes and the node of each token: (row, byte, from, to), and totals and stops per node.
    node_row, node_stop, node_end, node_start, child_node, child_byte, child_from, child_to = [], [], [], [], [], [], [], []
    is_boundary, branch_nodes = [], []
    known = {}
    for row, token in enumerate(text):
        spelled = tokens[token]
        for taken in range(1, len(spelled) + 1):
            prefix = spelled[:taken]
            if prefix not in known:
                known[prefix] = trie.children(prefix)
            start, stop, end = trie.ranges[prefix]
            node = len(node_row)
            node_row.append(row), node_start.append(start), node_stop.append(stop), node_end.append(end)
            is_boundary.append(taken == len(spelled))
            if taken == 1 and len(spelled) > 1 and len(branch_nodes) < branches:
                branch_nodes.append(node)
            for byte, a, b in known[prefix]:
                child_node.append(node), child_byte.append(byte), child_from.append(a), child_to.append(b)
    t = torch.tensor
    node_row, node_start, node_stop, node_end = t(node_row), t(node_start), t(node_stop), t(node_end)
    child_node, child_byte, child_from, child_to = t(child_node), t(child_byte), t(child_from), t(child_to)
    child_row = node_row[child_node]
    is_boundary, branch_nodes = t(is_boundary), t(branch_nodes, dtype=torch.long)
    interior = ~is_boundary
    width = size + 1

    def running(z):
        p = torch.softmax(z, -1)
        sums = torch.zeros(z.shape[0], width, dtype=torch.float64)
        torch.cumsum(p, -1, dtype=torch.float64, out=sums[:, 1:])
        return sums

    def roots(sums):
        mass = torch.zeros(sums.shape[0], 257, dtype=torch.float64)
        mass[:, root_byte] = sums[:, root_to] - sums[:, root_from]
        mass[:, 256] = sums[:, size] - sums[:, size - 1]
        return mass

    def run():
        sums = running(z)
        first = roots(sums)
        after = roots(running(zb))
        flat = sums.view(-1)
        at = node_row * width
        total = flat[at + node_end] - flat[at + node_start]
        stop = (flat[at + node_stop] - flat[at + node_start]) / total
        at = child_row * width
        share = (flat[at + child_to] - flat[at + child_from]) / total[child_node]
        mass = torch.zeros(len(node_row), 257, dtype=torch.float64)
        mass.view(-1)[child_node * 257 + child_byte] = share
        running_on, stopped = mass[is_boundary], stop[is_boundary]
        boundary = first.clone()
        boundary[1:] = boundary[1:] * stopped[:, None] + running_on
        mass[branch_nodes] += stop[branch_nodes][:, None] * after
        inside = mass[interior]
        inside = inside / inside.sum(-1, keepdim=True)
        every = torch.cat([boundary, inside]).float()
        top = torch.topk(every[:, :256], K, -1)
        symbols, order = torch.sort(top.indices, -1)
        listed = top.values.gather(1, order)
        tail = (1 - every[:, 256] - listed.sum(-1)).clamp_min(0)
        codes = torch.cat([listed, every[:, 256:], tail[:, None]], 1)
        codes = torch.round(-16 * torch.log2(codes)).clamp(0, 255).to(torch.uint8)
        return symbols.to(torch.uint8), codes

    return run


serve(prepare)
