"""How much RAM there is. Called by engine/kv_cache.py to size the cache of a CPU."""

import os


def free_ram_bytes() -> int:
    """RAM that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        return int(min(free, cgroup_free_bytes()))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cgroup_free_bytes() -> float:
    """What a container's limit (control group version 2) leaves; infinite without one."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return float(limit.read()) - float(used.read())
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")
