"""A probe takes every token task, and the trace says what each token is there for."""

import numpy as np
import pytest

import mamba_probe as mp

SMALL = {
    "mqar": mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=60, n_keys=2, filler="random"),
    "keep_nth": mp.tasks.keep_nth(batch=2, length=12, n=None, n_tokens=20, marker=True),
    "induction": mp.tasks.induction(batch=2, length=12, vocab=20, occurrences=2),
    "induction_every_token": mp.tasks.induction_every_token(batch=2, length=12, vocab=5),
    "repeated_tokens": mp.tasks.repeated_tokens(batch=2, period=6, vocab=20),
    "selective_copying": mp.tasks.selective_copying(batch=2, length=12, n_tokens=3, vocab=20),
}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_probe_records_it(name, model):
    task = SMALL[name]
    trace = mp.attach(model).record(task, variables=["delta"])
    for label in ("role", "target", "source_token"):
        assert (trace[label].values == getattr(task, label)).all()
    assert (trace["token_id"].values == task.input_ids).all()
    assert trace.attrs["task"] == name
    assert trace.attrs["answers"] == [task.answers.start, task.answers.stop]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_answer_stands_at_its_source_and_is_seen_by_then(name):
    task = SMALL[name]
    row, token = np.nonzero(task.target >= 0)
    source = task.source_token[row, token]
    assert ((source >= 0) & (source <= token)).all()
    assert (task.input_ids[row, source] == task.target[row, token]).all()
    assert np.isin(task.target[row, token], task.answers).all()
    assert ((task.role == "query") == (task.target >= 0)).all()
    assert ((task.source_token >= 0) == (task.target >= 0)).all()
    assert task.accuracy(task.target) == (row.size, row.size)
