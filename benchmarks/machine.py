"""What a number was measured on: hardware, versions, commit; and how fast that memory can be copied."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "vllm")


def cuda_device(num_devices: int = 1) -> torch.device:
    """The current GPU, for a benchmark that runs on `num_devices` of them and on nothing else."""
    if torch.cuda.device_count() < num_devices:
        sys.exit("error: this needs " + ("a CUDA device" if num_devices == 1 else f"{num_devices} CUDA devices"))
    return torch.device("cuda")


def copy_bytes_per_s(device: torch.device, num_bytes: int | None = None, repeats: int = 10) -> float:
    """Bytes read plus bytes written per second by the fastest of a few large copies within the device's memory."""
    if num_bytes is None:  # far more than any cache holds
        num_bytes = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * num_bytes / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> int:
    """On a GPU all its memory in use now, whichever process uses it: engines do not shrink while they live, so after a
    run this is their peak. On CPU the most that this process ever held."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, Any]:
    """What belongs beside every number."""
    return {"device": device_name(device), "versions": versions(), "commit": git_commit()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit that is checked out, with "+" if tracked files differ from it."""
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")
