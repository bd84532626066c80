#!/usr/bin/env python3
"""Builds target/emulator/libcuda.so.1, which runs the CUDA kernels on the host, for tests without a GPU:

    python3 kernels/tests/emulator/build.py
    PROPTEST_CASES=8 LD_LIBRARY_PATH=$PWD/target/emulator \\
        cargo test -p consilium-kernels --features cuda --lib --test backends -- cuda:: backend head

These two, and before them `python3 kernels/src/cuda/compile.py --check`, are what CI runs. The path must be absolute:
tests run in their package's folder, and one that finds no driver there says so and passes. Fibers are slow, so the
property tests get few cases.
"""

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "src" / "cuda"
OUT = HERE.parents[2] / "target" / "emulator"
COMPILE = ["g++", "-std=c++20", "-O2", "-fPIC", "-mf16c", "-DCONSILIUM_EMULATE", f"-I{HERE}", f"-I{CUDA / 'src'}", "-c"]


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    subprocess.run([*COMPILE, HERE / "driver.cpp", "-o", OUT / "driver.o"], check=True)
    objects = [OUT / "driver.o"]
    for source in sorted((CUDA / "src").glob("*.cu")):
        unit = OUT / f"{source.stem}.cpp"
        kernels = re.findall(r"\.visible \.entry (\w+)\(", (CUDA / "ptx" / f"{source.stem}.ptx").read_text())
        registered = "\n".join(
            f'static emulator::Registered register_{name}("{name}", emulator::Unpack<&{name}>::run);' for name in kernels
        )
        unit.write_text(f'#include "{source.name}"\n{registered}\n')
        subprocess.run([*COMPILE, unit, "-o", unit.with_suffix(".o")], check=True)
        objects.append(unit.with_suffix(".o"))
    subprocess.run(["g++", "-shared", "-o", OUT / "libcuda.so.1", *objects], check=True)


if __name__ == "__main__":
    main()
