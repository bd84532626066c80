"""Writes the vectors of documents, log entries and frames, from the formats' descriptions and without this project's code.

    python3 protocol/tests/vectors/make.py

A vector changes only together with a version: of the first line, of the entry, or of the frame.
"""

import hashlib
import json
import pathlib
import struct

HERE = pathlib.Path(__file__).parent


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(value):
    """RFC 8785 for integers and ASCII keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write(name, text):
    (HERE / name).write_bytes(text.encode())


TRAINING = {
    "inner_rounds": 8, "local_steps": 30, "rows": 12, "row_tokens": 96, "learning_rate_micros": 10000,
    "warmup_permille": 50, "final_permille": 20, "cross_entropy_permille": 100, "rank": 32, "alpha": 64,
    "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"],
    "outer_rate_permille": 700, "outer_momentum_permille": 650, "distillation": {"loss": "trie"},
    "merge": {"rule": "product"}, "defence": {"rule": "none"},
}
MANIFEST = {
    "consortium": "north", "round": 3, "mode": "unified", "charter": digest("charter"), "pivot": digest("pivot"),
    "reference": digest("reference"), "items": 4096, "symbol_space": "bytes", "symbols": 16, "fill_permille": 995,
    "shard_items": 1024, "fusion": {"rule": "softmax", "sharpness": 20}, "training": TRAINING, "quorum": 2,
    "members": ["bank", "clinic"],
    "deadlines": {"contribute_seconds": 60, "distil_seconds": 61, "evaluate_seconds": 62},
    "seed": 18446744073709551615, "previous_release": None,
}
TOKENS = MANIFEST | {
    "symbol_space": {"tokens": {"tokenizer": digest("tokenizer"), "size": 32000}}, "fusion": {"rule": "min_ce"},
    "previous_release": digest("release"),
}
PAIRWISE = MANIFEST | {
    "mode": "pairwise", "training": TRAINING | {
        "distillation": {"loss": "infigfusion", "symbols": 10, "temperature_permille": 1000, "graph_permille": 500}},
}
ADAPTERS = MANIFEST | {
    "mode": "adapters", "max_weight": 4, "training": TRAINING | {"distillation": {"loss": "labels"}},
}

# Public keys of the ed25519 seeds 01..01 and 02..02.
KEYS = ["8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c",
        "8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b394"]
CHARTER = f"""consilium/charter/1
consortium = "north"
log_key = "north-log+00000000+AAAA"
modes = ["unified", "pairwise", "adapters"]
quorum = 2
max_symbols = 16
gate_bound_permille = 250

[[members]]
institution = "bank"
key = "{KEYS[0]}"

[[members]]
institution = "clinic"
key = "{KEYS[1]}"
"""

EVENTS = [
    {"type": "opened", "manifest": digest("manifest"), "start": digest("start")},
    {"type": "joined", "institution": "clinic", "capacity": 7},
    {"type": "accepted", "institution": "clinic", "kind": "records", "sequence": 1, "artefact": digest("artefact"),
     "signature": "00" * 64, "ledger": digest("ledger")},
    {"type": "refused", "institution": "clinic", "kind": "adapter", "sequence": 2, "artefact": digest("artefact"),
     "code": "wrong-reference"},
    {"type": "closed", "phase": {"name": "contribute"}, "members": ["bank", "clinic"]},
    {"type": "closed", "phase": {"name": "distil", "inner": 5}, "members": []},
    {"type": "closed", "phase": {"name": "evaluate"}, "members": ["bank"]},
    {"type": "fused", "targets": digest("targets"), "routing": digest("routing")},
    {"type": "merged", "inner": 5, "adapter": digest("adapter"), "momentum": digest("momentum"),
     "truncation_ppm": 12345},
    {"type": "released", "release": digest("release"), "report": digest("report")},
    {"type": "rejected", "reason": "quorum"},
    {"type": "rejected", "reason": "gate"},
    {"type": "rejected", "reason": "no_gain"},
    {"type": "rejected", "reason": "operator"},
]


def entry(event):
    return canonical({"version": 1, "consortium": "north", "round": 3, "at": 1700000000000, "event": event})


# Bodies: fixed-width little-endian integers; strings and lists after a u64 count; enums after a u32 index; options after
# a byte; digests and signatures as they are.
def u16(n): return struct.pack("<H", n)
def u32(n): return struct.pack("<I", n)
def u64(n): return struct.pack("<Q", n)
def raw(name): return bytes.fromhex(digest(name))
def string(text): return u64(len(text.encode())) + text.encode()
def several(parts): return u64(len(parts)) + b"".join(parts)


def logged(event, proof):
    return string(entry(event)) + string(proof)


OPENED = b"\x01" + logged(EVENTS[0], "proof")
MERGED = logged(EVENTS[8], "proof 2")
STATEMENT = (string("north") + u64(3) + raw("manifest") + string("clinic") + u32(1) + u32(5) + raw("artefact"))
FRAMES = [
    ("hello", 1, u16(1) + string("node 1.0") + string("north") + string("clinic") + u32(7) + u64(41)),
    ("welcome", 2, u16(1) + raw("charter") + string("checkpoint\n") + several([raw("left"), raw("right")])),
    ("status wait", 3, b"\x00" + u32(0)),
    ("status score", 3, OPENED + u32(1) + several([u32(0), u32(9)])),
    ("status distil", 3, OPENED + u32(2) + u32(5) + MERGED + logged(EVENTS[7], "proof 3") + u64(99) + u64(10) + u64(20)),
    ("status evaluate", 3, OPENED + u32(3) + MERGED),
    ("status finished", 3, OPENED + u32(4) + logged(EVENTS[9], "proof 4")),
    ("status train", 3, OPENED + u32(5) + u32(5) + MERGED),
    ("upload", 4, STATEMENT + bytes(range(64)) + u64(1234) + raw("ledger")),
    ("ready", 5, u64(1000)),
    ("receipt", 6, logged(EVENTS[2], "proof 5")),
    ("reject", 7, u16(16)),
    ("download", 8, raw("artefact") + u64(512)),
    ("content", 9, u64(4096)),
]


def frame(kind, body):
    return b"CNSL" + u16(1) + u16(kind) + u32(len(body)) + hashlib.sha256(body).digest() + body


write("manifest.txt", f"consilium/manifest/1\n{canonical(MANIFEST)}\n")
write("manifest-tokens.txt", f"consilium/manifest/1\n{canonical(TOKENS)}\n")
write("manifest-pairwise.txt", f"consilium/manifest/1\n{canonical(PAIRWISE)}\n")
write("manifest-adapters.txt", f"consilium/manifest/1\n{canonical(ADAPTERS)}\n")
write("charter.txt", CHARTER)
write("entries.jsonl", "".join(entry(event) + "\n" for event in EVENTS))
write("frames.txt", "".join(f"{name}: {frame(kind, body).hex()}\n" for name, kind, body in FRAMES))
score = '{"bits_per_byte":%s,"accuracy":%s}'
write("evaluation.json", '{"candidate":%s,"pivot":%s,"source":%s}' % (
    score % ("0.5", "0.75"), score % ("1.25", "null"), score % ("0.625", "1.0")))
write("targets.json", '{"shards":["%s","%s"]}' % (digest("shard 0"), digest("shard 1")))
