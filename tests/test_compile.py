"""Every Triton kernel compiles for GPUs that are not here; in a process each, since it pretends to have that GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGING_S

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("capability", ["8.6", "9.0"])  # the least shared memory; what only Hopper and later have
def test_every_kernel_compiles(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), capability]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING_S)
    assert run.returncode == 0, run.stdout + run.stderr
