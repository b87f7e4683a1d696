"""A training that is interrupted, wherever it is, ends bit for bit where the uninterrupted one does."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mamba_probe.training import checkpoint, train, trainer
from mamba_probe.training.checkpoint import CHECKPOINT


def bits(result):
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(result):
    return [(point.step, point.loss, point.correct, point.total) for point in result.curve]


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, at):
    """Let the training break off as it draws the rows of step `at`."""
    drawn = trainer.rows

    def rows(config, step):
        if step == at:
            raise Interrupted
        return drawn(config, step)

    monkeypatch.setattr(trainer, "rows", rows)


@pytest.mark.parametrize("at", [0, 1, 3, 5, 6, 11])
def test_interrupted_at_any_step_and_resumed_it_ends_bit_equal(config, tmp_path, monkeypatch, at):
    whole = train(config)
    with monkeypatch.context() as patched:
        interrupt(patched, at)
        with pytest.raises(Interrupted):
            train(config, tmp_path)
    assert (tmp_path / CHECKPOINT).exists() == (at >= config.every)
    torch.rand(7)  # what others drew in between changes nothing
    resumed = train(config, tmp_path)
    assert same(bits(whole), bits(resumed))
    assert without_seconds(whole) == without_seconds(resumed)
    assert resumed.ended == "steps"


def test_every_mixer_resumes_bit_equal_and_the_checkpoints_are_equal_too(each_config, tmp_path):
    train(each_config, tmp_path / "whole")
    parts = [train(each_config, tmp_path / "parts", until=until) for until in (3, 6, 12)]
    assert [part.ended for part in parts] == ["until", "until", "steps"]
    assert not parts[0].finished
    assert parts[2].finished
    whole, resumed = (load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert same(whole, resumed)
    moments = {name.split(".")[0] for name in whole}
    assert moments == {"model", "exp_avg", "exp_avg_sq", "step"}


def test_without_its_moments_or_its_step_a_resumed_training_would_end_elsewhere(config, tmp_path, monkeypatch):
    """What the equality above rests on: the test can fail."""
    whole = train(config)
    train(config, tmp_path, until=6)
    restore = checkpoint.restore

    def forgetful(directory, config, model, optimizer):
        curve = restore(directory, config, model, optimizer)
        optimizer.state.clear()
        return curve

    monkeypatch.setattr(trainer.checkpoint, "restore", forgetful)
    assert not same(bits(whole), bits(train(config, tmp_path)))


def test_a_finished_training_is_not_trained_further(config, tmp_path):
    first = train(config, tmp_path)
    written = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    again = train(config, tmp_path)
    assert same(bits(first), bits(again))
    assert again.curve == first.curve
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == written


@pytest.mark.parametrize("breaks", ["while writing", "before the rename"])
def test_interrupted_inside_a_write_the_checkpoint_before_it_stands(config, tmp_path, monkeypatch, breaks):
    whole = train(config)
    train(config, tmp_path, until=3)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def broken(*args):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync" if breaks == "while writing" else "replace", broken)
        with pytest.raises(Interrupted):
            train(config, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    unfinished = tmp_path / f"{CHECKPOINT}.unfinished"
    assert unfinished.exists()
    unfinished.write_bytes(unfinished.read_bytes()[:100])
    resumed = train(config, tmp_path)
    assert same(bits(whole), bits(resumed))
    assert not unfinished.exists()


def test_out_of_time_it_stops_at_an_evaluation_and_goes_on_the_next_time(config, tmp_path):
    first = train(config, tmp_path, seconds=0.0)
    assert (first.ended, first.last.step) == ("seconds", 3)
    second = train(config, tmp_path, seconds=0.0)
    assert (second.ended, second.last.step) == ("seconds", 6)  # every call gets on, however short its budget
    third = train(config, tmp_path)
    assert third.ended == "steps"
    assert third.curve[:2] == second.curve
    assert third.last.seconds > second.last.seconds > first.last.seconds


def test_the_checkpoint_says_what_it_is_of_without_pickle(config, tmp_path):
    train(config, tmp_path, until=3)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as opened:
        said = opened.metadata()
    assert type(config).from_json(said["config"]) == config
    assert sorted(file.name for file in tmp_path.iterdir()) == [CHECKPOINT]


def test_a_checkpoint_of_another_training_is_refused_by_the_fields_that_differ(config, tmp_path):
    train(config, tmp_path, until=3)
    with pytest.raises(ValueError, match=r"another training \(learning_rate 0.01, not 0.02; seed 5, not 6\)"):
        train(replace(config, learning_rate=0.02, seed=6), tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_damaged_checkpoint_is_named(config, tmp_path, content):
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged"):
        train(config, tmp_path)


def test_a_file_of_weights_alone_is_no_checkpoint(config, tmp_path):
    from safetensors.torch import save_file

    save_file({"D": torch.ones(2)}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        train(config, tmp_path)


def test_restoring_what_is_not_there(config, tmp_path):
    model, optimizer = trainer._made(config)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.restore(tmp_path, config, model, optimizer)
