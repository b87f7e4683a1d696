"""Runs a script with Triton interpreted: `python tests/interpret.py SCRIPT [ARGUMENT ...]`.

The interpreter patches triton.language anew whenever one device function calls another, which takes a third of its
time and changes nothing: here it does so where the language is not patched already.
"""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import triton.language as tl
from triton.runtime import interpreter


def patch_once(patch: Callable[..., Any] = interpreter._patch_lang) -> None:
    def patched(fn: Callable[..., Any]) -> Any:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        missing = not languages or any(tl.core.is_builtin(language.load) for language in languages)
        return patch(fn) if missing else interpreter._LangPatchScope()

    interpreter._patch_lang = patched


if __name__ == "__main__":
    patch_once()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
