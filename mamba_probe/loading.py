"""Load a checkpoint of any supported format into a live transformers module, strictly and without running its code."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_probe.formats import files, placing, recognise, refuse_family
from mamba_probe.formats.fields import refuse_counts, with_sizes
from mamba_probe.formats.recipe import refuse_nonfinite, refuse_wrapped
from mamba_probe.formats.releases import warn_of_known_errors
from mamba_probe.untrusted import inside

__all__ = ["load", "load_tokenizer"]

_ZOO = "zoo:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ALONGSIDE = ("config.json", "generation_config.json")
_PATTERNS = (
    (*_ALONGSIDE, "model*.safetensors", "model.safetensors.index.json"),
    (*_ALONGSIDE, "params.json", "consolidated.safetensors"),
    (*_ALONGSIDE, "pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
"""What is fetched from the hub: safetensors, and another layout only where there are none of the one before."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    device_map: str | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a checkpoint as a live transformers module in eval mode.

    The format is recognised by config.json and the tensors' names: transformers (all ten Mamba families), original
    state-spaces (Mamba-1, Mamba-2, hybrids that Bamba can hold), Mamba-Codestral, mamba-minimal, mamba.py, fla,
    zoology, a bare mixer (MambaMixer, Mamba2Mixer, s4's S4D), or a model of `mamba_probe.blocks`. Every weight comes
    from the file: a missing, unexpected or mis-shaped one is an error. Code that comes with a checkpoint is never run.
    Where a directory holds both, safetensors are read and .bin are not. What no module here can hold, a quantised
    checkpoint and a LoRA adapter alone are refused by name.
    The module's `_mamba_probe_source` says where it came from: source, revision and dtype as given, format and the
    weight files' sha256.

    Source: ours.

    Args:
        source: a directory, a weight file beside its config.json, a hub id "owner/name", or "zoo:NAME".
        revision: branch, tag or commit of a hub id.
        dtype: floating dtype that all weights are cast to; None keeps each weight's own.
        device: where the weights go.
        device_map: instead of `device`, what accelerate takes: "auto", or module name -> device, "cpu" among GPUs
            being offload. Weights are read into memory first, so that "disk" is refused.

    Raises:
        FileNotFoundError: the path, its config.json or its weights are missing, or the hub id is out of reach.
        ValueError: the checkpoint is damaged, unsupported or does not fit its config; an argument is wrong.

    Example:
        >>> import tempfile
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> folder = tempfile.mkdtemp()
        >>> config = MambaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, state_size=2)
        >>> MambaForCausalLM(config).save_pretrained(folder)
        >>> model = load(folder)
        >>> type(model).__name__, model.training, model._mamba_probe_source["format"]
        ('MambaForCausalLM', False, 'transformers')
    """
    place = _device(device)
    _refuse_dtype(dtype)
    placing.refuse(device_map, device)
    path, where = _local(source, revision) or _from_hub(str(source), revision), str(source)
    folder = path if path.is_dir() else _weight_file(path).parent
    config = files.read_config(folder)
    refuse_family(config or {}, where)
    weight_files = files.find_weights(path) if path.is_dir() else [path]
    weights = files.read_weights(weight_files)
    refuse_wrapped(weights, where)
    refuse_nonfinite(weights, where)
    refuse_counts(config or {}, len(weights), where)
    form = recognise(config, weights, where)
    if dtype is not None:
        _cast(weights, dtype, where)
    recipe = form.convert(config or {}, weights, where)
    try:
        module: Any = recipe.fill(where).to(place).eval()
    except ValueError as error:
        raise with_sizes(error, config or {}, weights, where) from None
    if device_map is not None:
        module = placing.dispatch(module, device_map)
    warn_of_known_errors(module, where)
    _take_over_settings(module, folder)
    module._mamba_probe_source = {
        "source": where, "revision": revision, "dtype": dtype and str(dtype).removeprefix("torch."),
        "format": form.NAME, "sha256": files.sha256(weight_files),
    }  # fmt: skip
    return module


def load_tokenizer(source: str | os.PathLike[str], revision: str | None = None) -> Any:
    """Load a tokenizer with transformers' AutoTokenizer; code that comes with it is never run.

    Original state-spaces models use that of GPT-NeoX: `load_tokenizer("EleutherAI/gpt-neox-20b")`.

    Source: ours.

    Args:
        source: a directory, a hub id "owner/name", or "zoo:NAME".
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: there is no tokenizer there that can be loaded without running its code.

    Example:
        >>> import tempfile
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> folder = tempfile.mkdtemp()
        >>> words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
        >>> _ = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        >>> load_tokenizer(folder)("a")["input_ids"]
        [0]
    """
    from transformers import AutoTokenizer

    path = _local(source, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path or source), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source}: no tokenizer could be loaded without running code of its own. Name the one the model was"
            " trained with, a directory with tokenizer.json or a hub id ('EleutherAI/gpt-neox-20b' for state-spaces;"
            f" --tokenizer DIR_OR_HUB_ID on the command line). The cause: {error}"
        ) from error
    if not tokenizer("a b")["input_ids"]:  # what transformers makes up where it finds no vocabulary
        raise ValueError(
            f"{source} has no tokenizer: give a directory with tokenizer.json, or the hub id of the one the model was"
            " trained with ('EleutherAI/gpt-neox-20b' for state-spaces; --tokenizer on the command line)."
        )
    return tokenizer


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name a torch device such as 'cpu' or 'cuda', got {device!r}.") from error
    if place.type == "meta" or (place.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not available here; use 'cpu'.")
    return place


def _refuse_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(str(one) for one in _DTYPES)}; got {dtype!r}.")


def _cast(weights: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    for name, tensor in weights.items():
        weights[name] = tensor.to(dtype)
    refuse_nonfinite(weights, f"{where} as {dtype}")


def _weight_file(path: Path) -> Path:
    if path.suffix not in files.SUFFIXES:
        raise ValueError(f"{path} is a file, but not one of {', '.join(files.SUFFIXES)}; give its directory.")
    return path


def _local(source: Any, revision: str | None) -> Path | None:
    """The path that `source` names on this machine, or None for a hub id."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(
            f"source must be a directory, a hub id or 'zoo:NAME', got {source if source == '' else type(source)!r}; "
            "a live model needs no loading."
        )
    from mamba_probe import zoo

    text = os.fspath(source)
    path = zoo.path(text.removeprefix(_ZOO)) if text.startswith(_ZOO) else Path(text).expanduser()
    is_path = path.exists() or not isinstance(source, str)
    if not is_path and _HUB_ID.fullmatch(text):
        return None
    if not path.exists():
        raise FileNotFoundError(
            f"{text}: there is no such directory or file (looked for {path.absolute()}), and it is no hub id, "
            "which is 'owner/name'."
        )
    if revision is not None:
        raise ValueError(f"revision {revision!r} is for hub ids, but {text} is on this machine.")
    return path


def _from_hub(source: str, revision: str | None) -> Path:
    """Fetch a hub id's config and weights, or find them in the local cache; no other file is fetched."""
    for patterns in _PATTERNS:
        try:
            folder = _snapshot(source, revision, list(patterns))
        except (OSError, ValueError) as error:
            at = f"{source} at {revision!r}" if revision else source
            raise FileNotFoundError(
                f"{at}: not a directory here, and as a hub id neither reachable nor in the local cache: {error}\n"
                "Check the name and the connection, or copy the checkpoint and give its directory."
            ) from error
        if any((folder / name).is_file() for name in files.WEIGHTS):
            return folder
    return folder


def _snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot's folder; without a network older hub clients find a commit only if they are told to stay here."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except OSError as error:
        try:
            return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=True))
        except OSError:
            raise error from None


def _take_over_settings(module: nn.Module, folder: Path) -> None:
    """Let the config say the dtype that was loaded, and generate() use the checkpoint's own settings."""
    from transformers import GenerationConfig, PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return
    module.config.dtype = module.dtype
    settings = folder / "generation_config.json"
    if module.can_generate() and settings.is_file():
        given = files.read_json(inside(settings, folder))
        try:
            module.generation_config = GenerationConfig.from_dict(given)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{settings} is no generation config: {error}; correct it or remove it.") from error
