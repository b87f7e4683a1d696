"""The helper module `recorded`, as pytest's importlib mode finds no neighbours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
