"""What the tests here share: `edited`, a recurrence in numpy with the same edits; `edit_cells`, the grid held to it;
`patched`, runs to patch between."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

for _name in ("edited", "edit_cells", "patched"):
    _spec = spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _module = sys.modules[_name] = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
