"""mamba_probe: look inside trained Mamba models.

import mamba_probe as mp

model = mp.load("state-spaces/mamba-130m")    # hub id, directory, "zoo:NAME"; or bring any live model
with mp.attach(model) as probe:               # takes over each mixer's scan; leaving restores the model bit for bit
    trace = probe.record(input_ids)           # delta, A, B, C as a labelled xarray.Dataset
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

for _folder, _probe in (("kernels", "scan/__init__.py"), ("analyses", "wavelet_alignment")):
    if not (Path(__file__).parent / _folder / _probe).exists():
        raise ImportError(
            f"mamba_probe/{_folder} holds no {_probe}: it is a symbolic link to ../{_folder}, and this"
            " checkout lost it. Check out with `git config core.symlinks true`, or install the wheel."
        )

if TYPE_CHECKING:
    from mamba_probe import blocks, constructions, patching, tasks, zoo
    from mamba_probe import reducing as reduce
    from mamba_probe.analyses.common.frame import to_dataframe
    from mamba_probe.analyses.comparison import compare
    from mamba_probe.corpora import Corpus, corpus
    from mamba_probe.edits import ablate, assign, clamp, freeze, scale, swap, zero
    from mamba_probe.loading import load, load_tokenizer
    from mamba_probe.probe import Probe, attach, detach
    from mamba_probe.recorder import Recorder
    from mamba_probe.to_store import shard
    from mamba_probe.trace import open_trace
    from mamba_probe.trace.verify import verify

__all__ = [
    "Corpus", "Probe", "Recorder", "ablate", "assign", "attach", "blocks", "clamp", "compare", "constructions",
    "corpus", "detach", "freeze", "load", "load_tokenizer", "open_trace", "patching", "reduce", "scale", "shard",
    "swap", "tasks", "to_dataframe", "verify", "zero", "zoo",
]  # fmt: skip

__version__ = "0.1.0"

_MODULES = {name: name for name in ("blocks", "constructions", "patching", "tasks", "zoo")} | {"reduce": "reducing"}
_HOMES = {
    "analyses.common.frame": ("to_dataframe",),
    "analyses.comparison": ("compare",),
    "corpora": ("Corpus", "corpus"),
    "edits": ("ablate", "assign", "clamp", "freeze", "scale", "swap", "zero"),
    "loading": ("load", "load_tokenizer"),
    "probe": ("Probe", "attach", "detach"),
    "recorder": ("Recorder",),
    "to_store": ("shard",),
    "trace": ("open_trace",),
    "trace.verify": ("verify",),
}
"""Where each name lives: it is imported when it is first asked for, so that a shell completes without loading torch."""


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), _MODULES.get(name))
    if home is None:
        raise AttributeError(f"module 'mamba_probe' has no attribute {name!r}")
    module = import_module(f"mamba_probe.{home}")
    globals()[name] = found = module if name in _MODULES else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
