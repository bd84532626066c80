"""The loop of a benchmark twin: one case name a line in, the seconds of one repetition out.

A twin calls `serve` with a function from a case's words to a closure without arguments: the closure is what is timed,
everything before it is preparation. Closures are kept, so a case prepares its inputs once.
"""

import sys
import time


def serve(prepare):
    print("ready", flush=True)
    cases = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in cases:
            cases.clear()  # one case's inputs at a time in memory
            cases[name] = prepare(name.split())
            cases[name]()
        start = time.perf_counter()
        cases[name]()
        print(time.perf_counter() - start, flush=True)
