"""mamba_probe: look inside trained Mamba models.

import mamba_probe as mp

model = mp.load("state-spaces/mamba-130m")    # hub id, directory, "zoo:NAME"; or bring any live model
with mp.attach(model) as probe:               # takes over each mixer's scan; leaving restores the model bit for bit
    trace = probe.record(input_ids)           # delta, A, B, C as a labelled xarray.Dataset
"""

from pathlib import Path

for _folder, _probe in (("kernels", "scan/__init__.py"), ("analyses", "wavelet_alignment")):
    if not (Path(__file__).parent / _folder / _probe).exists():
        raise ImportError(
            f"mamba_probe/{_folder} holds no {_probe}: it is a symbolic link to ../{_folder}, and this"
            " checkout lost it. Check out with `git config core.symlinks true`, or install the wheel."
        )

from mamba_probe import blocks, constructions, patching, tasks, zoo  # noqa: E402
from mamba_probe import reducing as reduce  # noqa: E402
from mamba_probe.analyses.comparison import compare  # noqa: E402
from mamba_probe.corpora import Corpus, corpus  # noqa: E402
from mamba_probe.edits import ablate, assign, clamp, freeze, scale, swap, zero  # noqa: E402
from mamba_probe.load import load, load_tokenizer  # noqa: E402
from mamba_probe.probe import Probe, attach, detach  # noqa: E402
from mamba_probe.recorder import Recorder  # noqa: E402
from mamba_probe.to_store import shard  # noqa: E402
from mamba_probe.trace import open_trace  # noqa: E402
from mamba_probe.trace.verify import verify  # noqa: E402

__all__ = [
    "Corpus", "Probe", "Recorder", "ablate", "assign", "attach", "blocks", "clamp", "compare", "constructions",
    "corpus", "detach", "freeze", "load", "load_tokenizer", "open_trace", "patching", "reduce", "scale", "shard",
    "swap", "tasks", "verify", "zero", "zoo",
]  # fmt: skip

__version__ = "0.1.0"
