"""A checkpoint's folder from a stranger: no code, no file elsewhere, no size that its own bytes do not pay for."""

import ast
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

import mamba_probe as mp
from mamba_probe.formats import files
from mamba_probe.untrusted import JSON_BYTES

HERE = Path(mp.__file__).parent


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=2, state_size=4))


@pytest.fixture
def folder(tmp_path):
    mamba().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def weights(folder):
    """Its weights as a dictionary; the safetensors file is gone, for a .bin to take its place."""
    (folder / "model.safetensors").unlink()
    return {name: tensor for name, tensor in mamba().state_dict().items() if name != "lm_head.weight"}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "shard"])
def test_no_pickle_is_executed(folder, weights, payload, watch, name):
    path = folder / (name if name != "shard" else "part.bin")
    torch.save({**weights, "x": payload}, path)
    if name == "shard":
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "part.bin"}}))
    with pytest.raises(ValueError, match="Nothing of it was run"):
        mp.load(folder if name in ("shard", "pytorch_model.bin") else path)
    assert not payload.mark.exists()
    assert not watch.happened("os.mkdir", "os.system")
    with zipfile.ZipFile(path) as archive:
        inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with pytest.raises((pickle.UnpicklingError, AttributeError)):  # torch's persistent ids, after the payload ran
            pickle.loads(archive.read(inner))


def test_the_payload_works_where_nothing_guards(payload):
    pickle.loads(pickle.dumps(payload))
    assert payload.mark.is_dir()


@pytest.mark.parametrize("name", ["weights.npy", "weights.npz", "weights.pkl", "model.ckpt"])
def test_numpy_files_and_other_pickles_are_not_read(folder, payload, name, watch):
    path = folder / name
    if name.endswith(".npz"):
        np.savez(path, x=np.array([payload], dtype=object))
    elif name.endswith(".npy"):
        np.save(path, np.array([payload], dtype=object))
    else:
        path.write_bytes(pickle.dumps(payload))
    watch.events.clear()
    with pytest.raises(ValueError, match="is a file, but not one of"):
        mp.load(path)
    assert watch.opened(path.parent) == set()
    assert not payload.mark.exists()


FORBIDDEN = {"pickle.load", "pickle.loads", "numpy.load", "marshal.loads", "shelve.open", "yaml.load",
             "os.system", "os.popen", "joblib.load", "pd.read_pickle", "eval", "exec", "compile"}  # fmt: skip
SHELLS = {"mamba_probe/training/card.py"}
"""Who calls another program: git, for the commit that a training's card names."""


def calls():
    for root in (HERE, HERE / "kernels", HERE / "analyses"):
        for path in sorted(root.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield path, ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_the_package_holds_no_call_that_runs_what_it_reads():
    found = list(calls())
    assert len(found) > 5_000
    said = [(str(path), name) for path, name, _ in found if name in FORBIDDEN]
    assert said == []
    arrays = [words.get("allow_pickle") for _, name, words in found if name == "np.load"]
    assert set(arrays) == {"False"}, "said, and not left to numpy"
    loads = [(path.name, words) for path, name, words in found if name == "torch.load"]
    assert [(name, words["weights_only"]) for name, words in loads] == [("files.py", "True")]
    assert {words["trust_remote_code"] for _, _, words in found if "trust_remote_code" in words} == {"False"}
    assert {words["allow_pickle"] for _, _, words in found if "allow_pickle" in words} <= {"False"}
    shells = {path.relative_to(HERE.parent).as_posix() for path, name, _ in found if name.startswith("subprocess.")}
    assert shells <= SHELLS


@pytest.mark.parametrize(
    "named", ["../other/y.safetensors", "/etc/passwd", "/tmp/y.safetensors", "sub/../../y.bin", "..", ""]
)
def test_an_index_names_files_beside_it(folder, named):
    (folder / "model.safetensors").rename(folder.parent / "y.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": named}}))
    with pytest.raises(ValueError, match=r"must name .safetensors or .bin files beside it"):
        mp.load(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_no_link_leads_out_of_the_folder(folder, name, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / name).write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    (folder / name).rename(private / name)
    (folder / name).symlink_to(private / name)
    with pytest.raises(ValueError, match=rf"{name} is a link out of its folder, to .*private"):
        mp.load(folder)


def test_a_shard_that_is_a_link_out_is_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "part.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    with pytest.raises(ValueError, match=r"part.safetensors is a link out of its folder, to .*secret"):
        mp.load(folder)


def test_the_hubs_cache_and_a_link_that_the_user_names_are_followed(folder, tmp_path):
    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        path.rename(cache / "blobs" / path.name)
        (cache / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{path.name}")
    assert type(mp.load(cache / "snapshots" / "abc")).__name__ == "MambaForCausalLM"
    (tmp_path / "mine").symlink_to(cache / "snapshots" / "abc")
    assert type(mp.load(tmp_path / "mine")).__name__ == "MambaForCausalLM"
    (cache / "blobs" / "config.json").rename(tmp_path / "elsewhere.json")
    (cache / "blobs" / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        mp.load(cache / "snapshots" / "abc")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_pipe_is_no_file(folder, name):
    (folder / "model.safetensors").rename(folder / "kept")
    if name == "config.json":
        (folder / "kept").rename(folder / "model.safetensors")
        (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FileNotFoundError, match="has no"):
        mp.load(folder)


@pytest.mark.parametrize("header", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_safetensors_header_has_a_limit(folder, header):
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", header))
        stream.truncate(100_000_100)  # sparse: a header of 100 MB takes no disk
    with pytest.raises(ValueError, match=r"looks truncated or damaged; .*header too large"):
        mp.load(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 16]},
    ],
)
def test_a_safetensors_shape_is_paid_for_by_bytes(folder, entry):
    text = json.dumps({"D": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=r"looks truncated or damaged; .*header"):
        mp.load(folder)


def test_an_expanded_tensor_is_refused(folder, weights):
    huge = torch.ones(1).expand(10**6, 10**6)
    torch.save({**weights, "x": huge}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"x of shape \(1000000, 1000000\) holds fewer numbers than its shape says"):
        mp.load(folder)


def test_a_tensor_without_data_is_refused(folder, weights):
    torch.save({**weights, "x": torch.empty(10**9, 10**9, device="meta")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds fewer numbers than its shape says|is refused"):
        mp.load(folder)


def test_a_tensor_under_many_names_has_a_limit(folder):
    (folder / "model.safetensors").unlink()
    shared = torch.zeros(1 << 18)
    path = folder / "pytorch_model.bin"
    torch.save({f"x{i}": shared for i in range(64)}, path)
    with pytest.raises(ValueError, match=rf"take more than {files.MOST_SHARED} times its bytes"):
        mp.load(folder)
    torch.save({f"x{i}": shared for i in range(13)}, path)
    assert len(files.read_weights([path])) == 13, "what families tie is read"


def test_a_compressed_bin_is_refused(folder, weights, tmp_path):
    torch.save({"x": torch.zeros(10**7)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(
        folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED
    ) as bomb:  # fmt: skip
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (folder / "pytorch_model.bin").stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"is compressed, which torch\.save does not do"):
        mp.load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["deep", "large", "number", "float"])
def test_json_has_limits(folder, name, kind):
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
    text = {"deep": '{"a":' * 10**5, "number": '{"a": ' + "9" * 5_000 + "}", "float": '{"a": {"__float__": []}}'}
    with (folder / name).open("w") as stream:
        stream.write(text.get(kind, "{}"))
        if kind == "large":
            stream.truncate(JSON_BYTES + 1)
    with pytest.raises(ValueError, match="JSON"):
        mp.load(folder)


@pytest.mark.parametrize("value", [10**9, 10**18, 2**70])
@pytest.mark.parametrize("field", ["num_hidden_layers", "num_layers", "n_layer"])
def test_a_number_of_layers_is_paid_for_by_tensors(folder, field, value):
    edit(folder / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"{field}={value}, but the weights are \d+ tensors"):
        mp.load(folder)


def test_sizes_are_paid_for_by_weights(tmp_path):
    """transformers makes room for the config's shapes before it compares them: 10^12 numbers are refused before."""
    config = JambaConfig(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, mamba_d_state=4,
                         num_attention_heads=2, num_key_value_heads=2, num_experts=2, attn_layer_offset=1,
                         attn_layer_period=2)  # fmt: skip
    JambaForCausalLM(config).save_pretrained(tmp_path)
    assert type(mp.load(tmp_path)).__name__ == "JambaForCausalLM"
    edit(tmp_path / "config.json", vocab_size=10**6, hidden_size=10**6)
    with pytest.raises(ValueError, match=r"config.json is of [\d,]+ parameters, but the weights have [\d,]+"):
        mp.load(tmp_path)


def test_no_code_of_a_config_is_run(folder, tmp_path, watch):
    """auto_map names code beside the weights, and code on the hub: neither is opened."""
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "owner/name--evil.B"})
    watch.events.clear()
    with pytest.warns(UserWarning, match="`auto_map` names is not run"):
        mp.load(folder)
    assert folder / "evil.py" not in watch.opened(folder)
    assert (watch.network, watch.ran) == ([], [])
    assert not (tmp_path / "ran").exists()
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="its code, named by `auto_map`, is never run"):
        mp.load(folder)


def tokenizer(folder, **changes):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    edit(folder / "tokenizer_config.json", **changes)
    return folder


def refused(folder):
    """Whether a tokenizer is refused, by our own words."""
    try:
        mp.load_tokenizer(folder)
    except ValueError as error:
        return re.search("no tokenizer", str(error)).start()
    return False


@pytest.mark.parametrize(
    "auto_map",
    [{"AutoTokenizer": ["evil.Evil", None]}, {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
     {"AutoTokenizer": ["owner/name--evil.Evil", None]}, ["evil.Evil", None]],
)  # fmt: skip
def test_no_code_of_a_tokenizer_is_run(tmp_path, watch, auto_map):
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass")
    tokenizer(tmp_path, auto_map=auto_map, tokenizer_class="Evil")
    watch.events.clear()
    assert refused(tmp_path) or mp.load_tokenizer(tmp_path)("a")["input_ids"] == [0]
    assert tmp_path / "evil.py" not in watch.opened(tmp_path)
    assert (watch.network, watch.ran) == ([], [])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer"])
def test_a_tokenizer_reads_its_own_folder_alone(tmp_path, watch, kind):
    private = tmp_path / "private"
    private.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "secret.model"):
        (private / name).write_text('{"a": 0}')
    elsewhere = {"vocab_file": str(private / "vocab.json"), "merges_file": str(private / "merges.txt"),
                 "tokenizer_file": str(private / "tokenizer.json"), "spm_file": str(private / "secret.model"),
                 "added_tokens_file": "../private/vocab.json", "chat_template_file": str(private / "vocab.json"),
                 "special_tokens_map_file": str(private / "vocab.json"),
                 "fast_tokenizer_files": ["../private/tokenizer.1.json"], "name_or_path": str(private),
                 "tokenizer_class": kind}  # fmt: skip
    folder = tokenizer(tmp_path / "model", **elsewhere)
    watch.events.clear()
    refused(folder)
    assert watch.opened(private) == set()
    assert watch.network == []
