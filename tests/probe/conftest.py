"""What the tests here share: `edited`, a recurrence in numpy with the same edits."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location("edited", Path(__file__).with_name("edited.py"))
assert _spec is not None
assert _spec.loader is not None
_module = sys.modules["edited"] = module_from_spec(_spec)
_spec.loader.exec_module(_module)
