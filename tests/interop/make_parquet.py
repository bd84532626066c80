#!/usr/bin/env python3
"""Makes the Parquet fixtures of the node: training data as pyarrow, and so the Hugging Face hub, writes it.

    python3 -m venv .venv && .venv/bin/pip install pyarrow
    .venv/bin/python tests/interop/make_parquet.py node/tests/fixtures/data
"""
import pathlib
import sys

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 600  # more than the node decodes at once


def chat(i):
    turns = [{"content": f"question {i}", "role": "user"}, {"content": f"answer {i * 7 % 50} é", "role": "assistant"}]
    system = [{"content": "be brief", "role": "system"}]
    return (system if i % 3 == 0 else []) + turns * (1 + i % 2)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    ids = list(range(ROWS))
    message = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
    text = pa.table({"id": ids, "text": [f"note {i} takes {i * 7 % 50} units" for i in ids]})
    pq.write_table(text, folder / "text.parquet", compression="snappy", row_group_size=350)
    chats = pa.table({"prompt": [f"question {i}" for i in ids], "messages": pa.array([chat(i) for i in ids], message)})
    pq.write_table(chats, folder / "messages.parquet", compression="zstd", data_page_version="2.0")
    pairs = pa.table({
        "prompt": pa.array([[{"content": f"question {i}", "role": "user"}] for i in ids], message),
        "completion": pa.array([[{"content": f"answer {i}", "role": "assistant"}] for i in ids], message),
    })
    pq.write_table(pairs, folder / "pairs.parquet", compression="gzip", use_dictionary=False)
    bad = [None if i == 3 else "" if i == 5 else f"note {i}" for i in range(9)]
    pq.write_table(pa.table({"text": bad}), folder / "bad_rows.parquet")
    pq.write_table(pa.table({"text": pa.array([1, 2])}), folder / "numbers.parquet")
    counts = pa.list_(pa.struct([("content", pa.int64()), ("role", pa.string())]))
    pq.write_table(pa.table({"messages": pa.array([[{"content": 1, "role": "user"}]], counts)}), folder / "nested_numbers.parquet")
    pq.write_table(pa.table({"messages": pa.array([["question"]], pa.list_(pa.string()))}), folder / "no_roles.parquet")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
