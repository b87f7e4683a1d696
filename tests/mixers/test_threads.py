"""Two threads that record two models at once, and one model under autocast: one class of each family."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

import mamba_probe as mp

FAMILIES = ("falcon", "zamba", "bamba", "falcon_h1")
VARIABLES = ("delta", "B", "C", "h", "out", "u")


def ids_of(seed):
    return torch.randint(1, 61, (2, 21), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def build(request, every_family):
    return every_family[request.param]


def test_two_threads_record_two_models(build):
    models, prompts = [build(seed=seed) for seed in (0, 1)], [ids_of(seed) for seed in (0, 1)]
    probes = [mp.attach(model) for model in models]
    alone = [probe.record(ids, variables=VARIABLES) for probe, ids in zip(probes, prompts, strict=True)]
    assert float(abs(alone[0]["out"] - alone[1]["out"]).max()) > 1e-2, "two models that differ"
    start = Barrier(2)

    def record(which):
        traces = []
        for edits in ((), (mp.ablate("gate"),), ()) if which else ((), (), ()):
            start.wait()
            with probes[which].edit(*edits):
                traces.append(probes[which].record(prompts[which], variables=VARIABLES))
        return traces

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(record, (0, 1)))
    for which in (0, 1):
        for round_ in (0, 2):
            assert found[which][round_].equals(alone[which])
    assert found[0][1].equals(alone[0]), "the other model's edit does not reach this one"
    assert float(abs(found[1][1]["out"] - alone[1]["out"]).max()) > 1e-2


def test_under_autocast_the_recurrence_stays_wide_and_errs_as_the_library_does(build):
    model, ids = build(), ids_of(2)
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            native = model(ids).logits
    with mp.attach(model) as probe, torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            probed = model(ids).logits
        trace = probe.record(ids, variables=VARIABLES)
    assert trace["h"].dtype == trace["delta"].dtype == np.float32
    assert np.isfinite(trace["h"]).all()
    off = [float((logits.double() - exact.double()).abs().max()) for logits in (native, probed)]
    assert 1e-4 < off[1] <= 2 * off[0]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, exact)
