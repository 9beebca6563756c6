"""The files of a model's directory: whether they are there, and whole."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stars_fast.errors import ModelLoadError

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_model_directory(source: str | os.PathLike[str], *, allow_pickle: bool = True) -> None:
    """Check that a local model directory is there and complete; a hub id passes unchecked.

    Reads the configuration, the shard index and the headers of the safetensors files; of a LoRA
    adapter, those of its base, too.

    Parameters
    ----------
    source : str or path
        What names an existing file or folder, or can only be a path, is taken as local.
    allow_pickle : bool
        Whether pickled weights count.

    Raises
    ------
    ModelLoadError
        Naming the path and what is missing or damaged.
    """
    folder = Path(source)
    if not os.fspath(source) or not folder.exists():  # Path("") is the working directory
        if _HUB_ID.fullmatch(os.fspath(source)):
            return
        raise ModelLoadError(f"model directory {os.fspath(source)!r} does not exist")
    if not folder.is_dir():
        raise ModelLoadError(f"model path {str(folder)!r} is a file, not a directory")
    config = folder / "config.json"
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        check_model_directory(
            str(read_json(folder / "adapter_config.json").get("base_model_name_or_path")),
            allow_pickle=allow_pickle,
        )
        _check_safetensors(folder / "adapter_model.safetensors")
        return
    if not config.is_file():
        raise ModelLoadError(f"model directory {str(folder)!r} has no config.json")
    read_json(config)
    _check_weights(folder, allow_pickle)


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    whole, index = (folder / name for name in _SAFETENSORS)
    if whole.is_file():
        _check_safetensors(whole)
        return
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelLoadError(f"{str(index)!r} has no weight_map")
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).is_file():
                raise ModelLoadError(
                    f"model directory {str(folder)!r} lacks {shard}, which {index.name} lists"
                )
            _check_safetensors(folder / shard)
        return
    pickled = [name for name in _PICKLED if (folder / name).is_file()]
    if not pickled:
        raise ModelLoadError(
            f"model directory {str(folder)!r} has no weights: neither {' nor '.join(_SAFETENSORS)}"
        )
    if not allow_pickle:
        raise ModelLoadError(
            f"model directory {str(folder)!r} has pickled weights only ({pickled[0]}), which can "
            "run code when loaded; save it as safetensors, or pass allow_pickle=True"
        )


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, "pt"):  # compares the header with the size, and reads no tensor
            pass
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; ModelLoadError if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{str(path)!r} is not a JSON object")
    return value
