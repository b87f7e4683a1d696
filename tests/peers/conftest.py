"""`make test-peers` runs this folder: PYTHONPATH then holds what constraints-peers.txt lists.

Without it there is nothing here to collect; `pytest tests/peers` then ends with "no tests ran", an error.
"""

from importlib.util import find_spec

import beartype  # noqa: F401  (what checks our annotations in tests; it cannot be imported once nnsight has been)

if find_spec("nnsight") is None or find_spec("transformer_lens") is None:
    collect_ignore_glob = ["test_*.py"]
