"""CUDA C++ to PTX with NVRTC, which needs neither a GPU nor a toolkit.

Usage: nvrtc.py LIBRARY OUT SOURCE...   (the sources are put one after another)
"""

import ctypes
import os
import sys

ARCHITECTURE = "compute_75"
# Nothing is fused but what the source fuses: the emulated device does the same.
OPTIONS = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "--fmad=false"]


def main(library, out, *sources):
    nvrtc = ctypes.CDLL(library)

    def check(code, what):
        if code != 0:
            sys.exit(f"error: NVRTC: {what} failed with error {code}")

    def text(size, get):
        length = ctypes.c_size_t()
        check(size(program, ctypes.byref(length)), "asking for a length")
        buffer = ctypes.create_string_buffer(length.value)
        check(get(program, buffer), "asking for a text")
        return buffer.value

    parts = []
    for source in sources:
        with open(source, encoding="utf-8") as file:
            parts.append(f'#line 1 "{os.path.basename(source)}"\n{file.read()}')
    program = ctypes.c_void_p()
    joined = "".join(parts).encode()
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), joined, b"kernels.cu", 0, None, None)
    check(code, "taking the source")
    options = (ctypes.c_char_p * len(OPTIONS))(*[o.encode() for o in OPTIONS])
    compiled = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode().strip()
    if log:
        print(log, file=sys.stderr)
    check(compiled, "compiling")
    ptx = text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    with open(out, "wb") as file:
        file.write(ptx)


if __name__ == "__main__":
    main(*sys.argv[1:])
