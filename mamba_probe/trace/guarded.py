"""A Zarr store on disk that never answers with anything but what was written."""

import os
from pathlib import Path
from typing import Any

from google_crc32c import value as crc32c
from zarr.storage import LocalStore

__all__ = ["GuardedStore", "damage"]

CHECKSUM = 4
"""Bytes of a chunk's CRC-32C, at its end."""


class GuardedStore(LocalStore):
    """Read only; refuses once another store has taken its name (lazy arrays would change silently), and refuses chunks
    that are missing (Zarr would answer with its fill value) or not those that were written.

    `checked` is False for stores written before chunks carried checksums.
    """

    def __init__(self, root: Path, *, opened: int | None = None, checked: bool = True, **_options: Any):
        super().__init__(root, read_only=True)
        self._held = os.open(root, os.O_RDONLY)  # nothing else gets its number while this is open
        self._opened = os.stat(self._held).st_ino if opened is None else opened
        self._checked = checked

    def __del__(self) -> None:
        if hasattr(self, "_held"):
            os.close(self._held)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.root, self._opened, self._checked)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """See `LocalStore`.

        Raises:
            ValueError: replaced, removed or damaged since it was written.
        """
        if not self.root.exists() or self.root.stat().st_ino != self._opened:
            raise ValueError(f"{self.root} was replaced or removed since it was opened: open it again")
        found = await super().get(key, *args, **kwargs)
        wrong = damage(key, found) if self._checked else ""
        if wrong:
            raise ValueError(
                f"{self.root}: {wrong}. `mamba-probe verify {self.root}` names every damaged chunk; record them again"
            )
        return found


def damage(key: str, found: Any) -> str:
    """What is wrong with a chunk, in words; nothing of one that is whole, or of a key that is no chunk."""
    if "/c/" not in key and not key.endswith("/c"):
        return ""
    if found is None:
        return f"chunk {key} is missing"
    data = found.to_bytes() if hasattr(found, "to_bytes") else found
    if len(data) < CHECKSUM or crc32c(data[:-CHECKSUM]) != int.from_bytes(data[-CHECKSUM:], "little"):
        return f"chunk {key} is damaged: its checksum is not that of its bytes"
    return ""


def _again(root: Path, opened: int, checked: bool) -> GuardedStore:
    return GuardedStore(root, opened=opened, checked=checked)
