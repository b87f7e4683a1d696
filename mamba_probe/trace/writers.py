"""Who may write to a store: one process, or several that were told their shares; told by locks on its folder.

A lock (flock) goes with its process, however that ends.
"""

import fcntl
import os
import shutil
import time
from pathlib import Path

from mamba_probe.trace.blocks import journal

__all__ = ["Shard", "cleared", "joined", "locked", "locked_shard", "sweep"]

GRACE = 10.0
"""Seconds that a process waits for another of its job that makes or sweeps the store."""

Shard = tuple[int, int]
"""A process' number, and how many processes write the store."""


def locked(held: Path, path: Path, how: int) -> int:
    """A handle on `held` that keeps others from the store until it is closed, or its process dies.

    Raises:
        ValueError: another writer.
    """
    handle = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"another process is writing to {path}: wait for it, or choose another store (several processes write one"
            " store only with shard=, see mp.shard)"
        ) from None
    except OSError as error:
        os.close(handle)
        raise OSError(
            error.errno, f"{path} cannot be locked ({error.strerror}): its file system has no flock; choose another"
        ) from error
    return handle


def cleared(path: Path) -> tuple[Path, int]:
    """An empty folder to make a store in, which is named `path` once it is sealed, and the lock on it.

    What a killed maker left there is gone.

    Raises:
        ValueError: another process makes this store.
    """
    partial = path.with_name(f"partial.{path.name}")
    partial.mkdir(parents=True, exist_ok=True)
    lock = locked(partial, path, fcntl.LOCK_EX)
    for left in partial.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return partial, lock


def joined(path: Path) -> int:
    """A handle on a store beside those of its other shards; whoever comes first sweeps before the others write.

    Raises:
        ValueError: another writer.
    """
    until = time.monotonic() + GRACE
    while True:
        try:
            alone = locked(path, path, fcntl.LOCK_EX)
            sweep(path)
            os.close(alone)
        except ValueError:
            pass
        try:
            return locked(path, path, fcntl.LOCK_SH)
        except ValueError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def sweep(path: Path) -> None:
    """Remove what a writer left that was killed; none other may be there."""
    for leftover in path.rglob("*.partial"):
        leftover.unlink()


def locked_shard(path: Path, shard: Shard) -> int:
    """A handle that keeps others from this share of the rows, and from other divisions of them.

    Raises:
        ValueError: another writer.
    """
    held = journal(path) / f"shard-{shard[0]}-of-{shard[1]}"
    held.touch()
    handle = locked(held, path, fcntl.LOCK_EX)
    try:
        for other in journal(path).glob("shard-*-of-*"):
            if not other.name.endswith(f"-of-{shard[1]}"):
                os.close(locked(other, path, fcntl.LOCK_SH))
    except BaseException:
        os.close(handle)
        raise
    return handle
