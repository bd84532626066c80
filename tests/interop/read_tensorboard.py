#!/usr/bin/env python3
"""Reads an event file of the node with TensorBoard's own reader and prints its scalars, one a line.

    python3 -m venv .venv && .venv/bin/pip install tensorboard
    .venv/bin/python tests/interop/read_tensorboard.py runs/source
    .venv/bin/python tests/interop/read_tensorboard.py --golden   # the bytes of node/src/worker/tensorboard.rs

TensorBoard checks every record's checksums while it reads and drops a file from the first bad one on.
"""
import pathlib
import re
import sys
import tempfile

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

SOURCE = pathlib.Path(__file__).parents[2] / "node/src/worker/tensorboard.rs"


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(tag, e.step, e.wall_time, e.value) for tag in sorted(events.Tags()["scalars"]) for e in events.Scalars(tag)]


def golden():
    text = re.search(r'GOLDEN: &str = "([^"]*)"', SOURCE.read_text()).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "events.out.tfevents.1700000000.consilium.0"
        path.write_bytes(bytes.fromhex(re.sub(r"\\\s*", "", text)))
        assert len(list(LegacyEventFileLoader(str(path)).Load())) == 2
        found = [(tag, step, time, round(value, 6)) for tag, step, time, value in scalars(folder)]
    want = [("train/loss", 300, 1700000000.25, 2.5), ("train/rate", 300, 1700000000.25, 0.001)]
    assert found == want, found
    print("TensorBoard reads the golden bytes")


if __name__ == "__main__":
    if sys.argv[1:] == ["--golden"]:
        golden()
    else:
        for line in scalars(sys.argv[1]):
            print(*line)
