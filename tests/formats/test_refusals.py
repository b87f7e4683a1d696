"""Bad input: every wrong checkpoint gets the error that names what is wrong."""

import json
import os
import pickle
import warnings

import pytest
import torch

from mamba_probe.loading import load, load_tokenizer


class Payload:
    """A pickle of this runs code when it is read: it makes the file it was given."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(kit, tmp_path):
    """A good transformers directory to damage: its folder, config and weights."""
    model = kit.tiny("mamba")
    config = json.loads(model.config.to_json_string())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return tmp_path / "model", config, weights


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such directory or file"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked for .*nowhere"):
        load("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"a hub id,? which is 'owner/name'|no hub id"):
        load("nowhere")


@pytest.mark.parametrize("source", ["", None, torch.nn.Linear(1, 1)], ids=["empty", "None", "module"])
def test_wrong_source(source):
    with pytest.raises(ValueError, match="source must be a directory, a hub id or 'zoo:NAME'"):
        load(source)


def test_wrong_arguments(kit, saved):
    folder = kit.write(*saved)
    with pytest.raises(ValueError, match=r"dtype must be None or one of torch.float16.*got torch.int8"):
        load(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"dtype must be None or one of .*got 'float32'"):
        load(folder, dtype="float32")
    with pytest.raises(ValueError, match=r"device must name a torch device .*got 'gpu'"):
        load(folder, device="gpu")
    with pytest.raises(ValueError, match=r"device 'meta' is not available"):
        load(folder, device="meta")
    with pytest.raises(ValueError, match=r"revision 'main' is for hub ids"):
        load(folder, revision="main")


def test_directory_without_config(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; it holds notes.txt"):
        load(tmp_path)


def test_directory_of_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(FileNotFoundError, match=r"no config.json, but tokenizer.json: this is a tokenizer's directory"):
        load(tmp_path)


def test_a_pointer_in_place_of_weights(kit, saved):
    folder = kit.write(*saved)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"model.safetensors is a git-lfs pointer, not the weights"):
        load(folder)


def test_weights_within_another_module(kit, saved):
    folder, config, weights = saved
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=r"every weight begins with 'module.', as DataParallel has it"):
        load(kit.write(folder, config, wrapped))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, "config.json has hidden_size 32, the embedding in the file has 16."),
        ({"num_hidden_layers": 3}, "config.json has num_hidden_layers 3, the file has 2 layers."),
    ],
)
def test_sizes_of_another_config_are_said_first(kit, saved, change, said):
    folder, config, weights = saved
    kit.write(folder, config | change, weights)
    with pytest.raises(ValueError, match="do not fit MambaForCausalLM") as caught:
        load(folder)
    assert str(caught.value).splitlines()[0] == f"{folder}: {said}"


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds a LoRA adapter alone .*attach to that; or merge"):
        load(tmp_path)


def test_directory_without_weights(kit, saved):
    folder = kit.write(*saved)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weight file: looked for model.safetensors, .*holds config.json"):
        load(folder)


def test_a_file_that_is_no_weight_file(kit, saved):
    folder = kit.write(*saved)
    with pytest.raises(ValueError, match=r"is a file, but not one of .safetensors, .bin"):
        load(folder / "config.json")


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_config_that_is_not_json(kit, saved, text, message):
    folder = kit.write(*saved)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.95, 0.999])
def test_truncated(kit, saved, file, kept):
    folder = kit.write(*saved, file)
    path = folder / file
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{file} looks truncated or damaged"):
        load(folder)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_truncated_old_bin(kit, saved, kept):
    folder, config, weights = saved
    kit.write(folder, config, {})
    path = folder / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"pytorch_model.bin .*truncated or damaged"):
        load(folder)


@pytest.mark.parametrize("form", ["zip", "old", "plain2", "plain4"])
def test_a_pickle_that_would_run_code_is_refused_and_never_run(kit, saved, form, tmp_path):
    folder, config, weights = saved
    kit.write(folder, config, {})
    path, mark = folder / "pytorch_model.bin", tmp_path / "ran"
    content = {**weights, "x": Payload(mark)}
    if form.startswith("plain"):
        path.write_bytes(pickle.dumps(content["x"], protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refusal = r"pytorch_model.bin is refused: it holds more than tensors and could run code"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # torch says of protocol 4 that it does not read it, which is the refusal
        with pytest.raises(ValueError, match=refusal):
            load(folder)
    assert all("protocol 4" in str(one.message) for one in said)
    assert not mark.exists()
    if form == "plain2":
        pickle.loads(path.read_bytes())
        assert mark.is_dir(), "the payload itself must work, or this test proves nothing"


def test_bin_that_is_no_state_dict(kit, saved):
    folder, config, weights = saved
    with pytest.raises(ValueError, match=r"'model' must be a tensor, got dict: a state dict is needed .*model's alone"):
        load(kit.write(folder, config, {"model": weights, "epoch": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"'D' must be a tensor, got list"):
        load(kit.write(folder, config, {"model": {"D": [1.0]}}))
    with pytest.raises(ValueError, match=r"must hold a dictionary of tensors, got list"):
        load(kit.write(folder, config, list(weights.values())))
    with pytest.raises(ValueError, match=r"D must be dense and one of torch.float16.*torch.int8"):
        load(kit.write(folder, config, {"D": torch.ones(2, dtype=torch.int8)}))


def test_every_difference_is_named(kit, saved):
    folder, config, weights = saved
    weights["backbone.layers.0.mixer.A_lug"] = weights.pop("backbone.layers.0.mixer.A_log")
    weights["extra.weight"] = torch.ones(1)
    weights["backbone.layers.1.mixer.D"] = torch.ones(3)
    del weights["backbone.norm_f.weight"]
    with pytest.raises(ValueError, match="do not fit MambaForCausalLM") as caught:
        load(kit.write(folder, config, weights))
    text = str(caught.value)
    for line in (
        "missing backbone.layers.0.mixer.A_log (nearest: backbone.layers.0.mixer.A_lug)",
        "missing backbone.norm_f.weight",
        "unexpected extra.weight",
        "unexpected backbone.layers.0.mixer.A_lug (nearest: backbone.layers.0.mixer.A_log)",
        "shape of backbone.layers.1.mixer.D: expected (32,), got (3,)",
    ):
        assert line in text
    assert len(text.splitlines()) == 6


def test_one_layer_too_many(kit, saved):
    folder, config, weights = saved
    with pytest.raises(ValueError, match=r"unexpected backbone.layers.1.norm.weight\n"):
        load(kit.write(folder, config | {"num_hidden_layers": 1}, weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights(kit, saved, value):
    folder, config, weights = saved
    weights["backbone.layers.1.mixer.conv1d.bias"][3:5] = value
    with pytest.raises(ValueError, match=r"layers.1.mixer.conv1d.bias has 2 of 32 values NaN or infinite"):
        load(kit.write(folder, config, weights))


def test_a_cast_that_overflows(kit, saved):
    folder, config, weights = saved
    weights["backbone.layers.0.mixer.D"][0] = 1e6
    kit.write(folder, config, weights)
    load(folder)
    with pytest.raises(ValueError, match=r"as torch.float16: weights must be finite; .*mixer.D has 1 of 32"):
        load(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba3"}, r"model_type 'mamba3' \(Mamba-3\) has another recurrence"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not known to have a Mamba SSM layer; supported are"),
        ({"model_type": "zamba3"}, r"did you mean 'zamba2?'"),
        ({"model_type": "recurrent_gemma"}, r"'recurrent_gemma' is not known to have a Mamba SSM layer"),
        ({"model_type": "mambo"}, r"did you mean 'mamba'\?"),
        ({"model_type": "own", "auto_map": {}}, r"'own' \(its code, named by `auto_map`, is never run\)"),
        ({"model_type": "jamba", "quantization_config": {"quant_method": "gptq"}}, r"the weights are quantised"),
        ({"d_model": 3}, r"neither `model_type` \(transformers\) nor `d_model`, `n_layer` and `vocab_size`"),
    ],
)
def test_other_models(kit, config, message, tmp_path):
    """Said from the config, whatever the weights are."""
    with pytest.raises(ValueError, match=message):
        load(kit.write(tmp_path, config, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "16"}, r"hidden_size must be a whole number >= 1, got '16'"),
        ({"vocab_size": -1}, r"vocab_size must be a whole number >= 1, got -1"),
        ({"hidden_act": "silly"}, r"hidden_act 'silly' is no activation"),
        ({"time_step_rank": 0}, r"time_step_rank must be a whole number >= 1, got 0"),
        ({"use_bias": "no"}, r"not a valid mamba configuration: .*use_bias"),
    ],
)
def test_invalid_config(kit, saved, change, message):
    folder, config, weights = saved
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load(kit.write(folder, config | change, weights))


def test_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass")
    with pytest.raises(ValueError, match="no tokenizer could be loaded without running code") as caught:
        load_tokenizer(tmp_path)
    assert "--tokenizer DIR_OR_HUB_ID" in str(caught.value).splitlines()[0], "the advice leads"
    assert not (tmp_path / "ran").exists()
