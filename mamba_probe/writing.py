"""Files of ours: at every instant old or new, and never written through a link that somebody put there."""

import os
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that at every instant its path holds the old content or the new one, on disk.

    A link at the path is replaced, and what it leads to stays as it is.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "link").symlink_to(folder / "other")
        >>> write_whole(folder / "link", b"new")
        >>> (folder / "link").read_bytes(), (folder / "other").exists()
        (b'new', False)
    """
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)
