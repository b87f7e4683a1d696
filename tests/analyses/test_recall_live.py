"""On live transformers models of both families, the attributed contributions add up to the recorded mixer output."""

from torch import nn

import mamba_probe as mp
from mamba_probe.analyses import recall_circuit


def test_a_live_model_of_each_family_adds_up_to_its_mixer_output(model: nn.Module):
    asked = mp.tasks.mqar(batch=3, length=24, n_pairs=4, vocab=60, seed=1)
    with mp.attach(model) as probe:
        trace = probe.record(asked, variables=("delta", "A", "B", "C", "x", "z", "out"))
        static = probe.weights()
    answered = trace.assign_coords(prediction=trace.target.where(trace.target >= 0, 0))
    found = recall_circuit.measure(answered, weights=static)
    assert found.identity_error.shape == (2,)
    assert float(found.identity_error.max()) < 2e-6
    shifted = static.assign(D=static.D + 0.1)
    assert float(recall_circuit.measure(answered, weights=shifted).identity_error.max()) > 1e-3
