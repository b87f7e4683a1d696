"""What a config refuses, in words; and its JSON."""

import json
from dataclasses import replace

import pytest

from mamba_probe.training import Config, train


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1; got 0"),
        ({"steps": 10}, "steps must be a multiple of every = 3; got 10"),
        ({"batch": 2.0}, "batch must be a whole number >= 1; got 2.0"),
        ({"layers": True}, "layers must be a whole number >= 1; got True"),
        ({"fixed_batches": 0}, "fixed_batches must be a whole number >= 1; got 0"),
        ({"warmup": -1}, "warmup must be a whole number >= 0; got -1"),
        ({"seed": 2**20}, r"seed must be in 0 .. 1048575; got 1048576"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number > 0; got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number > 0; got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0; got -0.1"),
        ({"clip": 0}, "clip must be None or a finite number > 0; got 0"),
        ({"stop_at": 1.5}, r"stop_at must be None or in \(0, 1\]; got 1.5"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': .*cosine"),
        ({"dtype": "bfloat16"}, "unknown dtype 'bfloat16'"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda'; got 'tpu'"),
        ({"task": {"name": "mqra"}}, "unknown task 'mqra': .*mqar"),
        ({"task": {"length": 8}}, "task must be a dictionary with 'name'"),
        ({"task": {"name": "mqar", "lenght": 8}}, "unknown argument of mqar 'lenght': .*length"),
        ({"task": {"name": "mqar", "seed": 8}}, "seed is no argument here"),
        ({"task": {"name": "mqar", "length": 4, "n_pairs": 8}}, "mqar: needs length"),
        ({"mixture": [{"lenght": 8}]}, "unknown argument of mqar 'lenght': .*length"),
        ({"mixture": [{"name": "induction"}]}, "unknown argument of mqar 'name'"),
        ({"mixture": [{"length": 3}]}, "mqar: needs length even"),
        ({"mixture": [{"vocab": 16}]}, "mixture must keep the vocabulary, 12 ids; {'vocab': 16} makes it 16"),
        ({"mixer": {"d_model": 8}}, "mixer must be a dictionary with 'kind'"),
        ({"mixer": {"kind": "mamba3", "d_model": 8}}, "kind of a block must be one of"),
        ({"mixer": {"kind": "mamba1", "width": 8}}, "width"),
    ],
)
def test_refusals(config, change, said):
    with pytest.raises(ValueError, match=said):
        replace(config, **change)


def test_json_there_and_back(each_config):
    mixed = replace(each_config, mixture=[{"length": 8}, {"n_pairs": 1}])
    for config in (each_config, mixed):
        assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "this is no JSON"),
        ("[]", "a JSON object; got list"),
        ("{}", "lacks task, mixer"),
        ('{"task": {"name": "mqar"}, "mixer": {"kind": "s4d", "d_model": 8}, "step": 3}', "unknown field 'step'"),
    ],
)
def test_wrong_json(text, said):
    with pytest.raises(ValueError, match=said):
        Config.from_json(text)


def test_a_missing_field_takes_its_default(config):
    given = json.loads(config.to_json())
    del given["clip"]
    assert Config.from_json(json.dumps(given)).clip == 1.0


@pytest.mark.parametrize("until", [0, 4, 15])
def test_until_is_where_a_checkpoint_is(config, until):
    with pytest.raises(ValueError, match=f"a multiple of every = 3 within 1 .. 12 steps.*got {until}"):
        train(config, until=until)


def test_a_negative_budget_a_file_for_a_directory_and_a_device_that_is_not_there(config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        train(config, tmp_path / "file")
    with pytest.raises(ValueError, match="seconds must be"):
        train(config, seconds=-1.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' is not available here"):
        train(replace(config, device="cuda"))


def test_the_rate_rises_over_the_warmup_and_falls_by_its_schedule(config):
    rates = [replace(config, warmup=4).rate(step) / 1e-2 for step in range(12)]
    assert rates[0] == pytest.approx(0.25)
    assert rates[6] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert [replace(config, warmup=0, schedule="constant").rate(step) for step in (0, 11)] == [1e-2, 1e-2]
