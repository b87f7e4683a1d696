"""Sizes in bytes: as people say and write them, and how many are free."""

import re
from pathlib import Path

__all__ = ["free_memory", "n_bytes", "readable"]

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip


def n_bytes(given: int | str) -> int:
    """Bytes, also from text with a unit.

    Raises:
        ValueError: no size.

    >>> n_bytes("1.5 GB"), n_bytes("2MiB"), n_bytes(10)
    (1500000000, 2097152, 10)
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(given))
    if isinstance(given, bool) or found is None or found[2] not in UNITS or not float(found[1]):
        raise ValueError(f'a size is a number of bytes above 0, or text as "8GB" or "512MiB"; got {given!r}')
    return int(float(found[1]) * UNITS[found[2]])


def free_memory() -> int:
    """Bytes of memory that can be taken now, by the kernel's own reckoning and the limit of this process' group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def readable(n_byte: int) -> str:
    """Bytes as people say them.

    >>> readable(999), readable(5_400_000_000)
    ('999 B', '5.4 GB')
    """
    size, unit = float(n_byte), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{n_byte} B" if unit == 0 else f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
