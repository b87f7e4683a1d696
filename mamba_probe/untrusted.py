"""What a file from anyone may be: how large its JSON, and where its links may lead. docs/security.md has the limits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["JSON_BYTES", "inside", "read_object"]

JSON_BYTES = 16 << 20
"""Bytes of a JSON file, above which it is not parsed: Python's objects take some ten times as much. The largest that
we know, the index of a checkpoint of 100,000 tensors, has 10 MB."""


def read_object(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """Parse a file that must hold a JSON object.

    Args:
        path: an existing file.
        hook: applied to every object in it, as `json.loads` does.

    Raises:
        ValueError: larger than `JSON_BYTES`, not JSON (or nested beyond Python's recursion), or not an object.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> _ = path.write_text("[" * 100_000)
        >>> read_object(path)
        Traceback (most recent call last):
        ...
        ValueError: .../a.json cannot be read: it is not valid JSON: maximum recursion depth exceeded ...
    """
    size = path.stat().st_size
    if size > JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; JSON is read up to {JSON_BYTES:,} bytes.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=hook)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def inside(path: Path, folder: Path) -> Path:
    """`path`, if no link leads from it out of `folder`, which is where the user pointed.

    The hub's cache keeps SNAPSHOTS/REVISION/NAME as links into its own blobs folder, and those are followed.

    Raises:
        ValueError: the file that would be read lies elsewhere.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "config.json").symlink_to("/etc/hostname")
        >>> inside(folder / "config.json", folder)
        Traceback (most recent call last):
        ...
        ValueError: .../config.json is a link out of its folder, to /etc/hostname: copy the file there, or ...
    """
    real, home = path.resolve(), folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(each) for each in homes):
        raise ValueError(
            f"{path} is a link out of its folder, to {real}: copy the file there, or name the place that it links to"
        )
    return path
