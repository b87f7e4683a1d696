"""Files of a checkpoint: which they are, what they hold, their hash. Nothing in them is ever run."""

import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_probe.untrusted import inside, read_object

__all__ = ["CONFIGS", "SUFFIXES", "WEIGHTS", "find_weights", "read_config", "read_json", "read_weights", "sha256"]

CONFIGS = ("config.json", "params.json")
"""Names of the config, in the order in which they are looked for; the second is Mistral's."""

ADAPTER = "adapter_config.json"

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files in the order in which they are looked for; the first found is read."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_SHARED = 32
"""How many times the bytes of its files a checkpoint may take in memory: tied tensors share theirs in a .bin and get
memory of their own, and the most that a family here ties is one block in 13 places (Zamba)."""
_POINTER = b"version https://git-lfs"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_DAMAGED = "looks truncated or damaged; copy or download it again"


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read the config beside the weights; None if there is none, but there are weights.

    Source: ours; `CONFIGS` is the order.

    Raises:
        FileNotFoundError: there is neither a config nor a weight file.
        ValueError: it is not JSON, not an object, or a link out of the folder; or there is a LoRA adapter alone.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "params.json").write_text('{"dim": 8}')
        >>> read_config(folder)
        {'dim': 8}
    """
    found = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if found is None and (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter alone ({ADAPTER}). Load its base model, put the adapter on it with peft, "
            "and attach to that; or merge the two and save a whole checkpoint."
        )
    if found is None and any(path.suffix in SUFFIXES for path in folder.iterdir()):
        return None
    tokenizer = [name for name in _TOKENIZER if (folder / name).is_file()]
    if found is None and tokenizer:
        raise FileNotFoundError(
            f"{folder} has no config.json, but {' and '.join(tokenizer)}: this is a tokenizer's directory. Give the"
            " model's, and this one as the tokenizer's (--tokenizer on the command line)."
        )
    return read_json(inside(found or folder / CONFIGS[0], folder))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; transformers' {"__float__": "Infinity"} becomes the number.

    Source: ours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, not an object, or larger than `untrusted.JSON_BYTES`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"time_step_limit": [0.0, {"__float__": "Infinity"}]}')
        >>> read_json(path)
        {'time_step_limit': [0.0, inf]}
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; it holds {_listing(path.parent)}.")
    return read_object(path, _special_float)


def _special_float(item: dict[str, Any]) -> Any:
    return float(item["__float__"]) if item.keys() == {"__float__"} else item


def find_weights(folder: Path) -> list[Path]:
    """Weight files of a checkpoint's directory, sorted; safetensors are preferred to .bin.

    Source: ours; `WEIGHTS` is the order.

    Raises:
        FileNotFoundError: there is none, or a shard that the index names is missing.
        ValueError: the index is damaged, or a file is a link out of the folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "pytorch_model.bin").write_bytes(b"")
        >>> [path.name for path in find_weights(folder)]
        ['pytorch_model.bin']
    """
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no weight file: looked for {', '.join(WEIGHTS)}; it holds {_listing(folder)}."
        )
    return [inside(path, folder) for path in (_shards(inside(found, folder)) if found.suffix == ".json" else [found])]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} must map tensors to files under `weight_map`.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or Path(name).suffix not in SUFFIXES]
    if outside:
        raise ValueError(f"{index} must name .safetensors or .bin files beside it, got {outside}.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}.")
    return [index.parent / name for name in names]


def sha256(files: Sequence[Path]) -> str:
    """Hash of the files' bytes one after another, in sorted order; of one file, what `sha256sum` prints.

    Source: ours.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> _ = path.write_bytes(b"abc")
        >>> sha256([path])[:8]
        'ba7816bf'
    """
    total = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Read every tensor of the files into memory of its own, in the file's dtype, on the CPU.

    Source: ours. safetensors are otherwise mapped: a later change of the file would change the model. A pickle
    that holds nothing but {"model": state dict} is that state dict.

    Raises:
        ValueError: a file is truncated, damaged or a git-lfs pointer, is a pickle of more than tensors (it is not run),
            holds a tensor that another file holds, or one that is not floating point.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pytorch_model.bin"
        >>> torch.save({"D": torch.ones(2)}, path)
        >>> read_weights([path])
        {'D': tensor([1., 1.])}
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        _refuse_pointer(path)
        left = MOST_SHARED * path.stat().st_size
        stored = _read_safetensors(path) if path.suffix == ".safetensors" else _unwrapped(_read_bin(path))
        twice = sorted(weights.keys() & stored.keys())
        if twice:
            raise ValueError(f"{path} holds tensors that another weight file holds too: {', '.join(twice)}.")
        for name in list(stored):
            weights[name] = _own(name, stored.pop(name), path)
            left -= weights[name].nbytes
            if left < 0:
                raise ValueError(f"{path} holds tensors that take more than {MOST_SHARED} times its bytes.")
    return weights


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer, not the weights: fetch them with `git lfs pull` in the repository."
            )


def _unwrapped(content: dict[str, Any]) -> dict[str, Any]:
    """The state dict of a file that holds nothing but {"model": state dict}."""
    inner = content.get("model")
    return dict(inner) if len(content) == 1 and isinstance(inner, dict) else content


def _own(name: str, tensor: Any, path: Path) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{path}: {name!r} must be a tensor, got {type(tensor).__name__}: a state dict is needed (of a training "
            "state, save the model's alone)."
        )
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATING:
        expected = ", ".join(str(dtype) for dtype in _FLOATING)
        raise ValueError(f"{path}: {name} must be dense and one of {expected}; got {tensor.layout} {tensor.dtype}.")
    if tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {name} of shape {tuple(tensor.shape)} holds fewer numbers than its shape says (an expanded"
            " tensor, or one without data): save tensor.contiguous()."
        )
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} {_DAMAGED} ({error}).") from error


def _refuse_compressed(path: Path) -> None:
    """torch.save never compresses, and a compressed file may take a thousand times its bytes in memory."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} {_DAMAGED} ({error}).") from error
    if any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in entries):
        raise ValueError(f"{path} is compressed, which torch.save does not do: save the state dict again.")


def _read_bin(path: Path) -> dict[str, Any]:
    _refuse_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and could run code, or it is truncated or damaged "
            f"({_reason(str(error))}). Nothing of it was run; save a plain state dict, best as .safetensors."
        ) from error
    except Exception as error:  # on damaged bytes the unpickler raises whatever their misreading leads to
        raise ValueError(f"{path} {_DAMAGED} ({type(error).__name__}: {str(error).partition('. ')[0]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(content).__name__}.")
    return dict(content)


def _reason(message: str) -> str:
    """The line of torch's long message that names what was refused."""
    lines = [line.strip() for line in message.splitlines() if "nsupported" in line]
    return lines[0].partition(" was not an allowed")[0] if lines else "torch.load(weights_only=True) refuses it"
