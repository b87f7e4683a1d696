"""Help with examples that parse, completion that loads no torch, and errors that say what to type next."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe import cli_completing, zoo
from mamba_probe.analyses._names import names
from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.cli import app
from mamba_probe.cli_options import Task, What
from mamba_probe.cli_recording import _in_python
from mamba_probe.cli_steps import progress

COMMANDS = typer.main.get_command(app).commands
ROOT = Path(__file__).parents[2]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def said(text):
    return re.sub(r"\s+", " ", text)


# -- help -----------------------------------------------------------------------------------------------------------


def examples(command):
    """The commands in a command's help, as words."""
    lines = re.findall(r"^\s*((?:mamba-probe|torchrun) .*)$", COMMANDS[command].help, re.MULTILINE)
    return [shlex.split(re.sub(r"^torchrun .* -m mamba_probe ", "mamba-probe ", line)) for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name):
    found = examples(name)
    assert found, "an example"
    shown = said(call(name, "--help").stdout)
    for words in found:
        assert words[:2] == ["mamba-probe", name]
        assert " ".join(words[2:4]) in shown
        COMMANDS[name].make_context(name, words[2:])


def test_an_example_with_a_wrong_option_does_not_parse():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["record"].make_context("record", ["zoo:mqar-mamba1", "--tsk", "mqar", "-o", "run"])


# -- steps ----------------------------------------------------------------------------------------------------------


def test_without_a_terminal_a_step_is_a_plain_line_as_it_begins(capsys):
    with progress() as say:
        say("loading")
        assert capsys.readouterr().err == "loading\n"
        say("[b]drawing")
    assert capsys.readouterr().err == "[b]drawing\n", "once, and as it is"


# -- completion -----------------------------------------------------------------------------------------------------


def completed(*words, shell="bash", cwd=None):
    """What bash is given for the last of the words, parted at colons as bash parts them; and the modules loaded."""
    parted = [part for word in words for part in re.findall(r":|[^:]+", word) or [""]]
    asked = {"COMP_WORDS": shlex.join(["mamba-probe", *parted]), "COMP_CWORD": str(len(parted))}
    if shell != "bash":
        asked = {"_TYPER_COMPLETE_ARGS": " ".join(["mamba-probe", *words])}
    code = (
        "import atexit, json, sys; sys.argv[0] = 'mamba-probe'; from mamba_probe.cli import main;"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr)); main()"
    )
    env = os.environ | asked | {"_MAMBA_PROBE_COMPLETE": f"complete_{shell}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd)
    return done.stdout.split("\n")[:-1], json.loads(done.stderr.splitlines()[-1])


HEAVY = {"torch", "transformers", "triton", "xarray", "numpy", "matplotlib", "scipy"}


def test_models_are_completed_and_nothing_heavy_is_loaded():
    found, modules = completed("report", "zoo:mqar")
    assert found == ["mqar-mamba1"], "bash replaces what stands after the colon"
    assert not HEAVY & set(modules)
    found, modules = completed("report", "zoo:mqar", shell="zsh")
    assert '"zoo\\\\:mqar-mamba1"' in "".join(found)
    assert not HEAVY & set(modules)


def test_runs_are_completed_and_nothing_heavy_is_loaded(tmp_path):
    for name in ("first/trace.zarr", "below/second/trace.zarr", ".hidden/trace.zarr", "other/notes"):
        (tmp_path / name).mkdir(parents=True)
    found, modules = completed("analyze", "memory_horizon", "", cwd=tmp_path)
    assert found == ["below/second", "first"]
    assert not HEAVY & set(modules)
    assert completed("analyze", "all", "bel", cwd=tmp_path)[0] == ["below/second"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("first/trace.zarr", "below/second/trace.zarr"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(*words):
    """What is completed, within this process."""
    env = {"_MAMBA_PROBE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": " ".join(["mamba-probe", *words])}
    done = CliRunner().invoke(app, [], env=env, prog_name="mamba-probe")
    return [name.replace("\\\\:", ":") for name in re.findall(r'^(?:_arguments .*\(\()?"([^"]+)"', done.stdout, re.M)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["rep"], ["report", "reproduce"]),
        (["inspect", "zoo:"], [f"zoo:{name}" for name in zoo.names()]),
        (["record", "zoo:mqar-mamba1", "--task", ""], [task.value for task in Task]),
        (["reproduce", "trained"], [what.value for what in What if what.value.startswith("trained")]),
        (["analyze", "rec"], [name for name in names() if name.startswith("rec")]),
        (["analyze", "al"], ["all"]),
        (["analyze", "sinks,ab"], ["sinks,ablation"]),
        (["compare", "memory"], ["memory_horizon"]),
        (["compare", "sinks", "first", "one=f"], ["one=first"]),
        (["analyze", "sinks", "below/"], ["below/second"]),
        (["analyze", "sinks", "./f"], ["./first"]),
        (["verify", "fi"], ["first"]),
        (["report", "zoo:mqar-mamba1", "--analyses", "sink"], ["sinks"]),
        (["report", "zoo:mqar-mamba1", "--beside", "con"],
         ["construction:mamba1", "construction:mamba2", "construction:s4d"]),
        (["record", "some/directory", "--text", "no"], []),
    ],
    ids=lambda words: "-".join(words) if isinstance(words, list) else None,
)  # fmt: skip
def test_what_is_completed(here, words, found):
    assert asked(*words) == found


def test_paths_from_the_root_are_completed(here):
    assert asked("verify", f"{here}/fi") == [f"{here}/first"]


def test_the_names_that_are_completed_are_those_that_run():
    assert names() == list(analyses())


@pytest.mark.parametrize(
    ("words", "at", "found"),
    [
        ("mamba-probe report zoo : ", 3, (["mamba-probe", "report", ""], 2, "zoo:")),
        ("mamba-probe report zoo : a --beside construction : m", 8,
         (["mamba-probe", "report", "zoo:a", "--beside", "m"], 4, "construction:")),
        ("mamba-probe report zoo : a", 5, (["mamba-probe", "report", "zoo:a"], 3, "")),
        ("mamba-probe rep", 1, (["mamba-probe", "rep"], 1, "")),
    ],
    ids=["colon", "two", "after", "none"],
)  # fmt: skip
def test_words_that_bash_parted_are_put_together(words, at, found):
    assert cli_completing._joined(words.split(), at) == found


def test_bash_completes():
    """The script that is installed, in the shell itself."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = typer.completion.get_completion_script(
        prog_name="mamba-probe", complete_var="_MAMBA_PROBE_COMPLETE", shell="bash"
    )
    asks = "COMP_WORDS=(mamba-probe report zoo : mqar); COMP_CWORD=4; _mamba_probe_completion mamba-probe"
    asks += '; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{asks}"], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["mqar-mamba1"], done.stderr


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "wrong", "next_line"),
    [
        (["report", "zoo:mqar-mamba2", "--task", "mqar"], "no checkpoint is named",
         "try: mamba-probe zoo, for what ships"),
        (["record", "absent/of/mine", "--task", "mqar"], "no such directory",
         "try: mamba-probe inspect DIRECTORY, for"),
        (["record", "zoo:mqar-mamba1"], "either --task mqar or --text FILE; got neither",
         "try: mamba-probe record zoo:mqar-mamba1 --task mqar -o run"),
        (["report", "zoo:mqar-mamba1"], "either --task mqar or --text FILE; got neither",
         "try: mamba-probe report zoo:mqar-mamba1 --task mqar -o report"),
        (["record", "zoo:trained-induction-mamba1", "--task", "mqar"], "needs vocab // 2 - 1 >= n_keys",
         "names the task induction, and this command draws only mqar:"
         " mp.attach(mp.load('zoo:trained-induction-mamba1'))"
         ".record(mp.tasks.induction(batch=64, length=256, vocab=16, occurrences=1, special=0))"),
        (["analyze", "sinks", "an absent run"], "holds no run (no trace.zarr)",
         "try: mamba-probe record MODEL --task mqar -o 'an absent run'"),
        (["report", "zoo:mqar-mamba1", "--task", "mqar", "--analyses", "sinkz"],
         "unknown analysis 'sinkz': did you mean 'sinks'", "try: mamba-probe analyze --help, for all of them"),
        (["compare", "sinks", "absent", "absent2"], "holds no run", "try: mamba-probe record MODEL --task mqar -o RUN"),
    ],
    ids=["zoo", "model", "task", "report", "other task", "run", "analysis", "compare"],
)  # fmt: skip
def test_an_error_says_what_to_type_next(arguments, wrong, next_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert wrong in said(done.stderr)
    assert next_line in said(done.stderr)
    assert not (tmp_path / "out").exists()


def test_the_call_for_another_task_is_one_that_runs():
    (line,) = _in_python("zoo:trained-keep-mamba1-64", Task.mqar)
    code = re.search(r"mp\.attach\(.*\)\), after", line)[0].removesuffix(", after")
    assert eval(code, {"mp": mp}).sizes["token"] == 64
    assert _in_python("zoo:trained-mqar-mamba1", Task.mqar) == _in_python("a/model", Task.mqar) == []


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_what_ships_is_not_said_where_a_directory_is_there_and_wrong(name, tmp_path):
    (tmp_path / name).write_text("{")
    done = call("record", tmp_path, "--task", "mqar", "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert "try:" not in done.stderr


def test_a_model_to_inspect_that_is_not_there():
    assert "try: mamba-probe zoo, for what ships with the package" in call("inspect", "absent/of/mine").stderr


def test_a_command_that_is_misspelt_gets_the_nearest():
    done = call("anlyze", "sinks", "run")
    assert done.exit_code == 2
    assert "Did you mean 'analyze'" in said(done.stderr)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("a run") / "run"
    done = call("record", "zoo:mqar-mamba1", "--task", "mqar", "--rows", 2, "--length", 16, "--n-pairs", 2, "-o", out)
    assert done.exit_code == 0, done.output
    return out, done


def test_after_a_recording_the_next_command_is_said_and_results_are_not_overwritten(run, tmp_path, monkeypatch):
    out, done = run
    (line,) = re.findall(r"^next: (.*)$", done.stdout, re.MULTILINE)
    words = shlex.split(line)
    assert words == ["mamba-probe", "analyze", "all", str(out), "-o", "results"]
    COMMANDS["analyze"].make_context("analyze", words[2:])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/memory_horizon.nc").touch()
    again = call("analyze", "memory_horizon", out, "-o", "results")
    assert again.exit_code == 2
    assert "results/memory_horizon.nc exists: pass overwrite=True (--overwrite) to replace it" in said(again.stderr)


def test_an_earlier_run_is_overwritten_or_gone_on_with(run):
    out, _ = run
    refused = said(call("record", "zoo:mqar-mamba1", "--task", "mqar", "-o", out).stderr)
    assert "pass --overwrite to replace it, --resume to go on with it, or choose another directory" in refused
    refused = said(call("report", "zoo:mqar-mamba1", "--task", "mqar", "-o", out).stderr)
    assert "pass --overwrite to replace it, or choose another directory" in refused


def test_an_unknown_analysis_of_a_run(run, tmp_path):
    done = call("analyze", "memory_horizn", run[0], "-o", tmp_path / "results")
    assert done.exit_code == 2
    assert "unknown analysis 'memory_horizn': did you mean 'memory_horizon'" in said(done.stderr)
    assert "try: mamba-probe analyze --help" in said(done.stderr)


def test_an_error_without_a_next_command_has_none(tmp_path):
    done = call("record", "zoo:mqar-mamba1", "--text", "absent.txt", "-o", tmp_path / "out")
    assert "no text file at absent.txt" in done.stderr
    assert "try:" not in done.stderr
