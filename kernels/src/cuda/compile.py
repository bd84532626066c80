#!/usr/bin/env python3
"""Compiles src/*.cu to ptx/*.ptx. No GPU and no toolkit needed: NVRTC and ptxas come from pinned wheels.

    python3 kernels/src/cuda/compile.py           write the PTX
    python3 kernels/src/cuda/compile.py --check   compare with the PTX in the repository, assemble it for sm_80 and
                                                  sm_90, and fail where a kernel spills or needs a stack frame

CUDA 12.4 writes PTX 8.4, which drivers from 550 on read.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parents[2] / "target" / "cuda-tools"
WHEELS = ["nvidia-cuda-nvrtc-cu12==12.4.127", "nvidia-cuda-nvcc-cu12==12.4.131"]
OPTIONS = ["--gpu-architecture=compute_80", "--std=c++17", "--fmad=true", "--device-as-default-execution-space"]


def tool(name):
    found = list(TOOLS.glob(f"nvidia/**/{name}"))
    if not found:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TOOLS), *WHEELS]
        subprocess.run(pip, check=True)
        found = list(TOOLS.glob(f"nvidia/**/{name}"))
    return found[0]


def strings(values):
    return (ctypes.c_char_p * len(values))(*[value.encode() for value in values])


def compile_to_ptx(source):
    # The compiler opens its builtins by bare name.
    ctypes.CDLL(str(tool("libnvrtc-builtins.so.12.4")), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(tool("libnvrtc.so.12")))
    headers = sorted((HERE / "src").glob("*.cuh"))
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source.read_bytes(),
        source.name.encode(),
        len(headers),
        strings([header.read_text() for header in headers]),
        strings([header.name for header in headers]),
    )
    assert status == 0, f"nvrtcCreateProgram: {status}"
    status = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), strings(OPTIONS))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if log.value.strip():
        print(log.value.decode())
    if status != 0:
        sys.exit(f"{source.name}: NVRTC failed with {status}")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    return ptx.value.decode()


def resources(ptx, architecture):
    """What ptxas says of every kernel, one line each; the second value is whether one spills or has a stack frame."""
    report = subprocess.run(
        [tool("ptxas"), f"-arch={architecture}", "-v", "-o", "/dev/null", ptx], check=True, capture_output=True, text=True
    ).stderr
    lines, bad = [], False
    for name, frame, stores, loads, used in re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used ([^\n]*)",
        report,
        re.DOTALL,
    ):
        wrong = int(frame) + int(stores) + int(loads) > 0
        bad |= wrong
        lines.append(f"{architecture} {name}: {used}" + (f"; FRAME {frame} SPILLS {stores} {loads}" if wrong else ""))
    return lines, bad


def main():
    check = "--check" in sys.argv[1:]
    failed = False
    for source in sorted((HERE / "src").glob("*.cu")):
        path = HERE / "ptx" / f"{source.stem}.ptx"
        ptx = compile_to_ptx(source)
        if check and (not path.exists() or path.read_text() != ptx):
            print(f"{path.name} is not what {source.name} compiles to: run this script without --check")
            failed = True
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(ptx)
        for architecture in ["sm_80", "sm_90"]:
            lines, bad = resources(path, architecture)
            failed |= bad
            print("\n".join(lines))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
