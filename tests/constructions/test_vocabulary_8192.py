"""The largest cell of associative recall: 64 pairs, 512 tokens, 8,192 ids; models of 0.7 GB in float32, long tier."""

import pytest
import torch

from mamba_probe.constructions import mqar
from mamba_probe.tasks import mqar as task_of


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mixer", "code"),
    [("mamba1", "constant-weight"), ("mamba2", "one-hot"), ("mamba2", "constant-weight")],
)
def test_every_query_is_answered_among_4096_values(mixer, code, dtype):
    """One-hot keys in Mamba-1 would take 4,096 states a channel; they end at vocabulary 2,048."""
    construction = mqar(mixer, 4096, 4096, code, dtype=dtype)
    assert construction.sizes["state"] == (4096 if code == "one-hot" else 15)
    task = task_of(batch=2, length=512, n_pairs=64, vocab=8192, seed=64)
    answers = []
    with torch.no_grad():
        for row in construction.inputs(task.input_ids):
            answers.append(construction.model(row[None], use_cache=False).logits.argmax(-1))
    assert task.accuracy(torch.cat(answers)) == (128, 128)
