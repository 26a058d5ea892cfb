"""Compile each CUDA kernel to PTX and, with ptxas, to machine code: `python cuda_compiled.py FOLDER [ARCH …]`.

Prints a JSON table: kernel, dtype, architecture, registers, spilled bytes, shared memory. Needs no GPU; needs the extra
`gpu` and ptxas.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from numba import cuda, int16, types
from numba.cuda import dispatcher

from stillhouse.train.rnnt.cuda.kernels import kernels

KINDS = {"float16": types.float16, "bfloat16": int16, "float32": types.float32, "float64": types.float64}


def signatures(kind: str) -> dict[str, tuple]:
    real = types.float64 if kind == "float64" else types.float32
    x, one, two = KINDS[kind][:, ::1], real[::1], real[:, ::1]
    i, f, b = types.int64, types.float64, types.boolean
    ints, table, wide, any_table = i[::1], i[:, ::1], f[::1], types.Array(i, 2, "A")
    head = (table, ints, ints, ints, ints, any_table, ints, i, i, i, one, one, one)
    return {
        "rows": (x, *head, i, f, b),
        "wavefront": (ints, ints, ints, one, one, wide, wide),
        "occupancies": (ints, ints, ints, one, one, wide, wide, wide),
        "gradient": (x, x, *head, one, i, f, b, f, f),
        "unpack": (ints, ints, ints, one, types.float32[:, :, ::1]),
        "durations_in": (x, ints, ints, ints, ints, ints, two, f),
        "durations_out": (x, x, ints, ints, ints, ints, ints, two, one),
        "tdt_wavefront": (ints, ints, ints, one, one, two, ints, wide, wide),
        "tdt_occupancies": (ints, ints, ints, one, one, two, ints, wide, wide, wide, f),
    }


def main(folder: Path, architectures: list[str]) -> list[dict]:
    table = []
    for arch in architectures:
        capability = (int(arch[3:-1]), int(arch[-1]))
        # Functions that kernels call are typed for "the current device", which does not exist here.
        dispatcher.get_current_device = lambda cc=capability: SimpleNamespace(compute_capability=cc)
        kernels.cache_clear()
        for kind in KINDS:
            compiled = kernels(kind)
            for name, signature in signatures(kind).items():
                ptx, _ = cuda.compile_ptx(getattr(compiled, name).py_func, signature, cc=capability)
                source = folder / f"{name}-{kind}-{arch}.ptx"
                source.write_text(ptx)
                run = subprocess.run(
                    ["ptxas", "-v", f"-arch={arch}", str(source), "-o", str(source.with_suffix(".cubin"))],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                report = run.stderr

                def number(pattern: str, report: str = report) -> int:
                    match = re.search(pattern, report)
                    return int(match[1]) if match else 0

                spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
                table.append(
                    {
                        "kernel": name,
                        "dtype": kind,
                        "arch": arch,
                        "registers": number(r"Used (\d+) registers"),
                        "spill_bytes": spills,
                        "shared_bytes": number(r"(\d+) bytes smem"),
                    }
                )
    return table


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:] or ["sm_80", "sm_90"])))
