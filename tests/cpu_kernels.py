"""Print which instructions the numerical libraries report to use.

    python tests/cpu_kernels.py          # one line
    python tests/cpu_kernels.py avx2     # and fail where one of them uses AVX-512 or AMX

Each is asked in a process that computes with it, because that is when it chooses. `make test-avx2`
begins with this, which fails if a library no longer reads its variable.
"""

import os
import re
import subprocess
import sys

COMPUTE = """
import numpy, threadpoolctl, torch
x = torch.randn(256, 256)
x @ x
torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
y = x.bfloat16() @ x.bfloat16()
numpy.ones((2, 2)) @ numpy.ones((2, 2))
print("ATen:", torch.backends.cpu.get_cpu_capability())
for one in threadpoolctl.threadpool_info():
    if one["internal_api"] == "openblas":
        print("OpenBLAS:", one["architecture"])
"""
# Lines in which the libraries report their computations.
REPORTS = {
    "oneDNN": r"onednn_verbose,v1,info,cpu,isa:(.*)",
    "oneDNN float32": r"onednn_verbose,v1,primitive,exec,cpu,inner_product,([^,]*),",
    "oneDNN bfloat16": r"onednn_verbose,v1,primitive,exec,cpu,matmul,([^,]*),.*bf16",
    "MKL": r"MKL_VERBOSE oneMKL .* for Intel\(R\) 64 architecture (.*) processors",
    "ATen": r"ATen: (.*)",
    "OpenBLAS": r"OpenBLAS: (.*)",
}
BEYOND_AVX2 = re.compile(r"avx.?512|avx10|amx|skylakex|cooperlake|sapphirerapids|zen[45]", re.I)


def used():
    """{library: the instructions that it reports} of a process with this environment."""
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE], env=environment, check=True, capture_output=True, text=True
    )
    found = {name: re.search(report, done.stdout) for name, report in REPORTS.items()}
    return {name: match[1] for name, match in found.items() if match}


def main():
    libraries = used()
    print("kernels:", "; ".join(f"{name} {text}" for name, text in libraries.items()))
    if sys.argv[1:] == ["avx2"]:
        beyond = [name for name, text in libraries.items() if BEYOND_AVX2.search(text)]
        if beyond or not {"ATen", "oneDNN"} <= libraries.keys():
            sys.exit(f"not limited to AVX2: {', '.join(beyond) or 'no report'}")


if __name__ == "__main__":
    main()
