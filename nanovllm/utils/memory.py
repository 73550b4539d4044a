"""How much RAM there is. Called by engine/kv_cache.py to size the cache of a CPU."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_ram_bytes() -> int:
    """RAM that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        return int(min(free, cgroup_free_bytes()))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cgroup_free_bytes() -> float:
    """What a container's limit (control group version 2) leaves, files' cached pages included; infinite without one."""
    try:
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat["active_file"]) - int(stat["inactive_file"])
        return float((CGROUP / "memory.max").read_text()) - used
    except (OSError, ValueError, KeyError):  # no such file, or "max"
        return float("inf")
