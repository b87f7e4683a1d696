"""The command line: the main job end to end, and one clear message for wrong input."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe.cli import app
from mamba_probe.trace import open_dataset

README = str(Path(__file__).parents[2] / "README.md")
RESULTS = ("recall_circuit", "memory_horizon", "wavelet_alignment")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def task_report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("task") / "report"
    done = call(
        "report", "zoo:mqar-mamba1", "--task", "mqar", "--rows", 12, "--length", 32, "--n-pairs", 4, "-o", directory
    )
    assert done.exit_code == 0, done.output
    return directory, done


def letters(folder, **special):
    """A tokenizer of single letters, saved."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"?": 0} | {letter: i + 1 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .\n")}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module", params=["mamba", pytest.param("mamba2", marks=pytest.mark.long)])
def text_model(request, tmp_path_factory):
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mamba":
        model = MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=3))
    else:
        sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 2}
        model = Mamba2ForCausalLM(
            Mamba2Config(vocab_size=31, num_hidden_layers=3, pad_token_id=0, eos_token_id=0, **sizes)
        )
    model.save_pretrained(folder)
    letters(folder)
    return folder


def test_the_report_on_a_task(task_report):
    directory, done = task_report
    trace = mp.open_trace(directory / "trace.zarr")
    assert trace.sizes["batch"] == 12
    with pytest.raises(ValueError, match=r"report is a run's folder: its trace is .*trace\.zarr"):
        mp.open_trace(directory)
    for name in RESULTS:
        result = open_dataset(directory / "results" / f"{name}.nc")
        assert {"estimator", "null", "interval", "reduces_over", "trace_model_hash"} <= set(result.attrs)
        assert (directory / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (directory / "figures" / f"{name}.svg").read_text()[:500]
    circuit = open_dataset(directory / "results/recall_circuit.nc")
    assert bool(circuit["solved"])
    shares = dict(zip(circuit["intervention"].values, circuit["causal_share"].values, strict=True))
    assert shares["ablate(conv)"] > 0.9
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "self-contained"
    assert trace.attrs["model_hash"] in page
    assert "Recall circuit in layer 0" in page
    assert "the query finds its pair" in (directory / "figures/recall_circuit.svg").read_text(), "the diagram"
    said = re.sub(r"base64,[^\"]*|<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"\bnan\b", said, re.IGNORECASE)
    assert "Recall circuit in layer 0" in done.stdout
    steps = done.stderr.splitlines()
    assert {"loading zoo:mqar-mamba1", *(f"measuring {name}" for name in RESULTS), "drawing"} <= set(steps)
    assert len(steps) == len(set(steps)), "each once"


def test_a_report_is_not_overwritten_unasked_and_is_when_asked(task_report):
    directory, _ = task_report
    again = (
        "report",
        "zoo:mqar-mamba1",
        "--task",
        "mqar",
        "--rows",
        2,
        "--length",
        32,
        "--n-pairs",
        4,
        "-o",
        directory,
    )
    refused = call(*again)
    assert refused.exit_code == 2
    assert "pass --overwrite" in refused.stderr
    assert mp.open_trace(directory / "trace.zarr").sizes["batch"] == 12
    assert call("record", *again[1:], "--overwrite").exit_code == 0
    assert mp.open_trace(directory / "trace.zarr").sizes["batch"] == 2


def test_the_report_on_text_has_no_circuit_and_still_answers(text_model, tmp_path):
    (tmp_path / "notes.txt").write_text("the cat sat on the mat. " * 12)
    out = tmp_path / "report"
    done = call("report", text_model, "--text", tmp_path / "notes.txt", "--length", 40, "--rows", 3, "-o", out)
    assert done.exit_code == 0, done.output
    trace = mp.open_trace(out / "trace.zarr")
    assert trace.sizes["token"] == 40
    assert trace.attrs["tokens_left_out"] == 24 * 12 - 120
    assert "".join(trace["token_text"].values[0, :7]) == "the cat"
    circuit = open_dataset(out / "results/recall_circuit.nc")
    assert not bool(circuit["solved"])
    page = (out / "report.html").read_text()
    assert "No task:" in page
    assert "the query finds its pair" not in (out / "figures/recall_circuit.svg").read_text()
    assert page.count("data:image/png;base64,") == 2, "no picture of nothing"
    horizon = open_dataset(out / "results/memory_horizon.nc")
    assert np.isfinite(horizon["layer_lti_horizon"].values).all()
    assert "The table has all 3 layers" in page


def test_record_and_analyze_are_the_steps_of_report(task_report, tmp_path):
    options = ("--task", "mqar", "--rows", 12, "--length", 32, "--n-pairs", 4)
    assert call("record", "zoo:mqar-mamba1", *options, "-o", tmp_path / "run").exit_code == 0
    done = call("analyze", "recall_circuit", tmp_path / "run", "-o", tmp_path / "results")
    assert done.exit_code == 0, done.output
    assert "Recall circuit in layer 0" in done.stdout
    assert (tmp_path / "results/recall_circuit.svg").exists()
    result = open_dataset(tmp_path / "results/recall_circuit.nc")
    assert result["baseline"].sel(signature="S1").values.item() < 0.6
    assert call("analyze", "recall_circuit", tmp_path / "run", "-o", tmp_path / "results").exit_code == 2


def test_overwriting_leaves_nothing_of_an_earlier_run(task_report, text_model, tmp_path):
    out = tmp_path / "run"
    options = ("--task", "mqar", "--rows", 2, "--length", 16, "--n-pairs", 2)
    assert call("record", "zoo:mqar-mamba1", *options, "-o", out).exit_code == 0
    assert (out / "twin.zarr").exists()
    (tmp_path / "n.txt").write_text("the cat sat on the mat. " * 4)
    done = call("record", text_model, "--text", tmp_path / "n.txt", "--length", 40, "-o", out, "--overwrite")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == ["parity.nc", "trace.zarr", "weights.nc"]
    trace = mp.open_trace(out / "trace.zarr")
    assert trace.attrs["tokens_left_out"] == 0
    assert trace["valid"].sum("token").values.tolist() == [40, 40, 16]


def test_a_last_row_too_short_to_measure_is_left_out_and_said_to_be(text_model, tmp_path):
    (tmp_path / "n.txt").write_text("a" * 42)
    out = tmp_path / "report"
    done = call("report", text_model, "--text", tmp_path / "n.txt", "--length", 40, "-o", out)
    assert done.exit_code == 0, done.output
    assert "2 tokens of the file left out" in (out / "report.html").read_text()


def test_unknown_tokens_are_said_in_one_line_and_a_text_of_them_is_refused(text_model, tmp_path):
    letters(tmp_path / "words", unk_token="?")
    (tmp_path / "upper.txt").write_text("THE CAT " * 10 + "sat")
    options = ("--text", tmp_path / "upper.txt", "--tokenizer", tmp_path / "words", "--length", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = call("record", text_model, *options, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "upper.txt: 60 of 83 tokens (72.3%) are the tokenizer's unknown token" in line
    (tmp_path / "upper.txt").write_text("THE" * 10)
    done = call("record", text_model, *options, "-o", tmp_path / "other")
    assert done.exit_code == 2
    assert "upper.txt: all 30 tokens are the tokenizer's unknown token" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the cat sat o", "gives rows of 13 token(s); rows of at least 16 tokens are needed: give a longer text"),
        (b"caf\xe9 " * 9, "is not UTF-8 text"),
        (None, "is a directory: --text takes one file"),
    ],
)
def test_a_text_that_cannot_be_read_says_what_to_do(text_model, tmp_path, content, message):
    text = tmp_path / "notes"
    text.mkdir() if content is None else text.write_bytes(content)
    done = call("record", text_model, "--text", text, "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert message in done.stderr
    assert ("iconv -f latin1 -t utf-8 FILE" in done.stderr) == ("UTF-8" in message)


def test_zoo_doctor_version_and_help():
    listed = CliRunner().invoke(app, ["zoo"], env={"COLUMNS": "80"}).stdout
    lines = [line for line in listed.splitlines() if "zoo:" in line]
    assert [line.split()[1] for line in lines] == [f"zoo:{name}" for name in mp.zoo.names()], "one line each, whole"
    assert "mqar" in lines[0]
    assert "1.000 (2048/2048)" in lines[0]
    for name in ("mqar-mamba1", "zoo:mqar-mamba1"):
        assert mp.zoo.card("mqar-mamba1")["what"] in call("zoo", name).stdout
    doctor = call("doctor").stdout
    assert torch.__version__.split("+")[0] in doctor
    assert re.search(r"scan of a model on cpu\s*│ cpu:", doctor)
    assert mp.__version__ in call("--version").stdout
    for command in ("report", "record", "analyze", "zoo", "doctor"):
        text = call(command, "--help")
        assert text.exit_code == 0
        assert len(text.stdout) > 100
    assert "mamba-probe report zoo:trained-mqar-mamba1" in call("report", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "zoo:mqar-mamba1"], "say what to record on"),
        (
            ["report", "zoo:mqar-mamba2", "--task", "mqar"],
            "no checkpoint is named 'mqar-mamba2'; did you mean 'mqar-mamba1'",
        ),
        (["report", "absent/folder/here", "--task", "mqar"], "no such directory"),
        (["report", "zoo:mqar-mamba1", "--task", "copy"], "'copy' is not one of 'mqar'. "),
        (["report", "zoo:mqar-mamba1", "--task", "mqr"], "'--task': 'mqr' is not one of 'mqar': did you mean 'mqar'?"),
        (["report", "zoo:mqar-mamba1", "--text", "absent.txt"], "no text file at absent.txt"),
        (
            ["report", "zoo:mqar-mamba1", "--text", README],
            "zoo:mqar-mamba1 has no tokenizer and no vocabulary of text: its ids are those of its task, mqar",
        ),
        (["report", "zoo:mqar-mamba1", "--text", README, "--task", "mqar"], "got both"),
        (["report", "zoo:mqar-mamba1", "--task", "mqar", "--n-pairs", "1"], "n_pairs is at least 2"),
        (["report", "zoo:mqar-mamba1", "--task", "mqar", "--length", "8"], "length"),
        (["report", "zoo:mqar-mamba1", "--task", "mqar", "--backend", "triton"], "triton"),
        (["analyze", "recal", "absent"], "holds no run"),
    ],
)
def test_wrong_input_exits_with_2_and_one_message(arguments, message, tmp_path):
    done = call(*arguments, "-o", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "report.html").exists()


def test_an_unknown_analysis_gets_the_nearest_name(task_report, tmp_path):
    done = call("analyze", "recal_circuit", task_report[0], "-o", tmp_path)
    assert done.exit_code == 2
    assert "unknown analysis 'recal_circuit': did you mean 'recall_circuit'" in done.stderr


def test_a_bare_mixer_cannot_be_fed_a_task(tmp_path):
    mp.constructions.haar(length=64, levels=2).save(tmp_path / "haar")
    done = call("report", tmp_path / "haar", "--task", "mqar", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "takes hidden states, not token ids" in re.sub(r"\s+", " ", done.stderr)


def test_attributes_of_a_store_are_json(task_report):
    store = json.loads((task_report[0] / "trace.zarr" / "zarr.json").read_text())
    assert json.loads(json.loads(store["attributes"]["task_params"]))["n_pairs"] == 4
