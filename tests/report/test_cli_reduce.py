"""`mamba-probe reduce`: the numbers of `probe.reduce`, a picture, and a text that is refused by name."""

import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe.cli import app
from mamba_probe.trace import open_dataset

WORDS = "the cat sat on the mat.\nthen it ran. " * 6


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

    out = tmp_path_factory.mktemp("model")
    vocab = {letter: i for i, letter in enumerate("?abcdefghijklmnopqrstuvwxyz .\n")}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(out)
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, state_size=2, num_hidden_layers=2)).save_pretrained(out)
    (out / "notes.txt").write_text(WORDS)
    return out


@pytest.fixture(scope="module")
def reduced(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("reduced") / "sizes"
    done = call("reduce", folder, "--text", folder / "notes.txt", "--layout", "packed", "--length", 16,
                "--separator", 0, "--batch-size", 4, "-o", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    return out, done


def test_its_numbers_are_those_of_the_recorded_steps(folder, reduced):
    out, _ = reduced
    found = open_dataset(out / "reduction.nc").load()
    ids = mp.load_tokenizer(folder)(WORDS)["input_ids"]
    with mp.attach(mp.load(folder)) as probe:
        rows = mp.corpus([ids], layout="packed", length=16, separator=0)
        trace = probe.record(rows, variables=["delta"])
    valid = trace["valid"]
    for layer in (0, 1):
        steps = trace["delta"].sel(layer=layer).where(valid).astype("float64")
        mean = steps.mean(("batch", "token"))
        every = found["delta_mean"].sel(layer=layer)
        np.testing.assert_allclose(every.sel({"class": "all"}).values, mean.values, rtol=1e-6)


def test_it_leaves_a_result_a_picture_and_nothing_half_done(reduced):
    out, done = reduced
    assert sorted(path.name for path in out.iterdir()) == ["reduction.nc", "reduction.png"]
    assert (out / "reduction.png").read_bytes()[:4] == b"\x89PNG"
    assert [line.rpartition("/")[2] for line in done.stdout.splitlines()[-2:]] == ["reduction.nc", "reduction.png"]
    assert "newline" in open_dataset(out / "reduction.nc")["class"].values.tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "reduction.nc exists: pass overwrite=True (--overwrite)"),
        ({"--text": "absent.txt", "-o": "new"}, "absent.txt"),
        ({"--length": None, "-o": "new"}, "length"),
        ({"--layout": "padded", "--long": "keep", "-o": "new"}, "keep"),
        ({"MODEL": "absent/of/mine", "-o": "new"}, "try: mamba-probe zoo, for what ships"),
        ({"MODEL": "zoo:mqar-mamba1", "-o": "new"}, "has no tokenizer"),
    ],
    ids=["exists", "text", "length", "long", "model", "tokenizer"],
)
def test_what_it_refuses(folder, reduced, tmp_path, changed, message):
    given = {"MODEL": folder, "--text": folder / "notes.txt", "--layout": "packed", "--length": 16, "-o": reduced[0]}
    given |= {name: tmp_path / value if name == "-o" else value for name, value in changed.items()}
    options = [word for name, value in given.items() if name != "MODEL" and value is not None for word in (name, value)]
    done = call("reduce", given["MODEL"], *options)
    assert done.exit_code == 2, done.output
    assert message in re.sub(r"[\s│]+", " ", done.stderr)
    assert "Traceback" not in done.output
