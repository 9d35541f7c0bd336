"""A few of the tests that need a GPU, under Triton's interpreter. ``TRITON_INTERPRET=1 pytest tests/cuda`` runs all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.7", reason="interpreting FlexAttention's GPU kernels needs Triton 3.7")

KERNELS = "tests/cuda/test_flex_cuda.py::test_float32"
SOME = [
    f"{KERNELS}[a full block-softcap, window and sinks-2]",
    f"{KERNELS}[a full block-learned table of distances-1]",
    "tests/cuda/test_models_cuda.py::test_packed_equals_eager_unpacked[llama]",
]


@pytest.mark.slow
@pytest.mark.parametrize("node", SOME)
def test_a_gpu_test_passes_without_a_gpu(node: str) -> None:
    """In a process of its own: the interpreter takes the place of torch's kernels for the CPU."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", node]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "1 passed" in done.stdout
