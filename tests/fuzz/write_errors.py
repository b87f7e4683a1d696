"""Write docs/errors.md from the table that its test provokes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from provoked import page

(Path(__file__).parents[2] / "docs" / "errors.md").write_text(page(), encoding="utf-8")
