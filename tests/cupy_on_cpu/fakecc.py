#!/usr/bin/env python3
"""``fakecc BASE [-I… -D…]``: compile BASE.cu, CUDA C++ as CuPy generates it, into BASE.so by g++.

BASE.names lists the template instances that are asked for, one a line.  Each kernel gets an entry
point ``fake_call_NAME`` that takes its arguments as pointers; a template instance is called
``name0``, ``name1``, …  The headers are precompiled once for each set of options.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNEL = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\("
HEADERS = ("complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h")
COMPILER = ["g++", "-std=c++17", "-O1", "-w", "-fpermissive", "-ffp-contract=off", "-fPIC"]


def precompiled(folder: Path, command: list[str]) -> Path:
    """The header to include, which lies beside its precompiled form."""
    key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:10]
    header = folder / f"shim_{key}.h"
    done = header.with_suffix(".h.gch")
    if not done.exists():  # kernels may be compiled by several processes at once
        own = folder / f"shim_{key}.{os.getpid()}.h"
        lines = [f'#include "{HERE / "shim.h"}"', *(f"#include <cupy/{name}>" for name in HEADERS)]
        own.write_text("\n".join(lines) + "\n")
        built = own.with_suffix(".gch")
        subprocess.run([*command, "-x", "c++-header", own, "-o", built], check=True)
        own.replace(header)
        built.replace(done)
    return header


def translate(source: str, instances: list[str], header: Path) -> str:
    """C++ for g++: the source, and an entry point for each of its kernels."""
    source = re.sub(  # shared memory whose size is an argument of the launch
        r"extern\s+__shared__\s+([\w:<> ]+?)\s+(\w+)\s*\[\s*\]\s*;",
        r"\1* \2 = (\1*)fake_shared();",
        source,
    )
    templates = set(re.findall(r"template\s*<[^>]*>\s*(?:static\s+)?" + KERNEL, source))
    plain = [name for name in dict.fromkeys(re.findall(KERNEL, source)) if name not in templates]
    entries = {f"name{i}": instance for i, instance in enumerate(instances)}
    entries.update((name, name) for name in plain)
    calls = (
        f'extern "C" void fake_call_{name}(void** arguments) {{ fake_call(&{kernel}, arguments); }}'
        for name, kernel in entries.items()
    )
    return "\n".join([f'#include "{header}"', source, *calls, ""])


def main(base: str, *options: str) -> int:
    """Compile; the exit status of g++."""
    source = Path(f"{base}.cu").read_text()
    instances = Path(f"{base}.names").read_text().splitlines()
    own = [option for option in options if not option.startswith("-DCUPY_KERNEL_NAME")]
    synchronises = re.search(r"__syncthreads|__shfl|__syncwarp", source)
    command = [*COMPILER, *own, f"-I{os.environ['FAKECUDA_INC']}"]
    if synchronises:
        command.append("-DFAKE_SYNC")
    header = precompiled(Path(base).parent, command)
    Path(f"{base}.cpp").write_text(translate(source, instances, header))
    return subprocess.call([*command, "-shared", f"{base}.cpp", "-o", f"{base}.so"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
