"""Reads what a benchmark writes for its twin: token bytes in rank order, and a text as ranks."""


def read(path):
    tokens, text = [], []
    for line in open(path):
        if line.startswith("text"):
            text = [int(rank) for rank in line.split()[1:]]
        else:
            tokens.append(bytes.fromhex(line.strip()))
    return tokens, text


class Trie:
    """Ranges of ranks below every prefix; tokens are sorted, so each is contiguous."""

    def __init__(self, tokens):
        self.ranges = {}
        for rank, token in enumerate(tokens):
            for taken in range(len(token) + 1):
                start, stop, _ = self.ranges.get(token[:taken], (rank, rank, rank))
                if taken == len(token):
                    stop = rank + 1
                self.ranges[token[:taken]] = (start, stop, rank + 1)

    def children(self, prefix):
        """(byte, start, end) of every child."""
        found = []
        for byte in range(256):
            child = self.ranges.get(prefix + bytes([byte]))
            if child:
                found.append((byte, child[0], child[2]))
        return found
