"""A run's folder from a stranger: what it names is not read, and no model is fetched, without the user's word."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe import tasks
from mamba_probe.cli import app
from mamba_probe.reference import describe, is_closed_form, load_beside, named
from mamba_probe.report import labelled, measurable, write_report
from mamba_probe.run import Run, record_given


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def words(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def recorded():
    return record_given(load_beside("construction:mamba1", 8), tasks.mqar(batch=2, length=16, n_pairs=2, vocab=8))


@pytest.fixture(scope="module")
def stored(recorded, tmp_path_factory):
    """A run whose trace says that its model lies in a private folder, which is one that would load."""
    root = tmp_path_factory.mktemp("stranger")
    mp.constructions.mqar("mamba1", 8, 8).save(root / "private")
    said = json.dumps({"source": str(root / "private"), "revision": None, "dtype": None})
    replace(recorded, trace=recorded.trace.assign_attrs(loaded_from=said)).save(root / "run")
    return root


def test_a_folder_that_a_run_names_is_not_read(stored, watch):
    run = Run.open(stored / "run")
    assert "which the run says is" in run.lacks_model()
    assert "--load-models" in run.lacks_model()
    with pytest.raises(ValueError, match=r"loaded from there only if you say so, with --load-models"), run.probe():
        pass
    assert labelled([str(stored / "run")])["run"].model is None
    assert "attribution" not in measurable(run)[0]
    assert watch.opened(stored / "private") == set()


def test_with_the_users_word_it_is_read_and_its_weights_compared(stored, watch):
    run = Run.open(stored / "run", load_models=True)
    assert run.lacks_model() == ""
    with pytest.raises(ValueError, match="are not those that were recorded"), run.probe():
        pass
    assert stored / "private" / "config.json" in watch.opened(stored / "private")


def test_the_flag_is_that_word(stored, tmp_path):
    refused = call("analyze", "attribution", stored / "run", "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "loaded from there only if you say so, with --load-models" in words(refused.stderr)
    given = call("analyze", "attribution", stored / "run", "-o", tmp_path / "yes", "--load-models")
    assert "are not those that were recorded" in words(given.stderr)
    helped = words(call("analyze", "--help").stdout.replace("│", ""))
    assert "This reads that directory, or the network." in helped


def test_a_hub_id_that_a_run_names_is_not_fetched(recorded, watch):
    trace = recorded.trace.assign_attrs(loaded_from='{"source": "owner/name", "revision": "main", "dtype": null}')
    with pytest.raises(ValueError, match="only if you say so"), replace(recorded, model=None, trace=trace).probe():
        pass
    assert watch.network == []


def test_what_ships_is_loaded_without_asking(recorded):
    with replace(recorded, model=None).probe() as probe:
        assert probe.model is not recorded.model


@pytest.mark.parametrize(
    "said",
    ["[", "[1]", '{"source": 3}', '{"revision": "x"}', '{"source": "zoo:mqar-mamba1", "vocab": "8"}', "[" * 100_000,
     '{"source": "zoo:mqar-mamba1", "dtype": "load"}', '{"source": "zoo:../../../etc"}',
     '{"source": "construction:../x", "vocab": 8}', '{"source": "zoo:mqar-mamba1", "run": "me"}'],
)  # fmt: skip
def test_a_damaged_record_of_the_model_is_refused(recorded, said):
    run = replace(recorded, model=None, trace=recorded.trace.assign_attrs(loaded_from=said))
    with (
        pytest.raises(ValueError, match=r"loaded_from|loaded as|no checkpoint is named|unknown construction"),
        run.probe(),
    ):
        pass


@pytest.mark.parametrize("name", ["trace.zarr", "weights.nc", "interventions.nc", "beside"])
def test_a_store_that_links_out_of_the_run_is_refused(recorded, tmp_path, name):
    recorded.save(tmp_path / "other")
    recorded.save(tmp_path / "run")
    target = tmp_path / "other" / name if name != "beside" else tmp_path / "other"
    if name != "beside":
        (tmp_path / "run" / name).rename(tmp_path / "kept")
    (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"{name} is a link out of its folder, to .*other"):
        Run.open(tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "other")
    assert Run.open(tmp_path / "latest").sizes["batch"] == 2, "a link that the user names is the user's word"


def test_sizes_that_no_memory_holds_are_refused_when_a_run_is_opened(recorded, tmp_path):
    import h5netcdf

    recorded.save(tmp_path / "run")
    with h5netcdf.File(tmp_path / "run" / "parity.nc", "w") as file:
        file.dimensions = {"x": 2**40}
        file.create_variable("huge", ("x",), "f4", chunks=(2**25,))
    with pytest.raises(ValueError, match=r"would take .* bytes of memory; at most"):
        Run.open(tmp_path / "run")


def test_a_card_from_a_stranger_names_only_what_ships(tmp_path, watch):
    mp.constructions.mqar("mamba1", 8, 8).save(tmp_path / "model")
    mp.constructions.mqar("mamba1", 8, 8).save(tmp_path / "private")
    card = tmp_path / "model" / "card.json"
    for name in (str(tmp_path / "private"), "owner/name", 7):
        card.write_text(json.dumps({"beside": name}))
        done = call("report", tmp_path / "model", "--task", "mqar", "--n-pairs", 2, "-o", tmp_path / "out")
        assert done.exit_code == 2
        assert "does not ship with the package: pass --beside" in words(done.stderr)
    assert watch.opened(tmp_path / "private") <= {
        tmp_path / "private" / n for n in ("config.json", "model.safetensors")
    }
    card.write_text(json.dumps({"beside": "construction:mamba2"}))
    assert named(str(tmp_path / "model")) == "construction:mamba2"


def test_the_card_of_a_folder_that_a_stored_reference_names_is_not_read(recorded, tmp_path, watch):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "card.json").write_text('{"what": "the secret", "construction": 1}')
    watch.events.clear()
    name = str(tmp_path / "private")
    assert (describe(name), is_closed_form(name)) == ("", False)
    other = replace(recorded, model=None, trace=recorded.trace.assign_attrs(model=name))
    page = write_report(replace(recorded, beside=other), {}, tmp_path).read_text()
    assert watch.opened(tmp_path / "private") == set()
    assert "the secret" not in page
    assert describe(name, given=True) == "the secret", "or this test proves nothing"
    assert describe("construction:../x") == ""


def test_names_of_analyses_are_no_paths(stored, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for command in ("analyze", "compare"):
        for name in ("../x", "/tmp/x", "..", "recall_circuit/../../x"):
            more = [stored / "run"] if command == "compare" else []
            done = call(command, name, stored / "run", *more, "-o", tmp_path / "out")
            assert done.exit_code == 2, done.output
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "out"] == []


def test_labels_are_no_paths(recorded, tmp_path):
    recorded.save(tmp_path / "one")
    done = call("compare", "memory_horizon", f"../../a={tmp_path / 'one'}", f"/b={tmp_path / 'one'}",
                "--variable", "layer_lti_horizon", "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"one", "out"}
    assert all(path.name.startswith("memory_horizon") for path in (tmp_path / "out").iterdir())


def test_the_watch_sees_what_it_must(tmp_path, watch):
    """The oracle itself: a file that is opened, a process that runs."""
    import subprocess

    (tmp_path / "file").write_text("x")
    subprocess.run(["true"], check=True)
    assert watch.opened(tmp_path) == {tmp_path / "file"}
    assert watch.ran
