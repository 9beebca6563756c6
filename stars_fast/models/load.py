"""Loading a language model, with errors that name the file to blame."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stars_fast.config import Quantize
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.checks import has_lm_head
from stars_fast.models.files import check_model_directory
from stars_fast.models.images import SEEING
from stars_fast.models.lora import LoraAdapter
from stars_fast.models.packed import ours, theirs
from stars_fast.models.progress import bars_on_terminals_only
from stars_fast.models.quantize import check_quantize, quantize_model
from stars_fast.models.sharded import loading_options, num_shards, why_not_sharded

#: Ends of the names of classes that have a head of another kind on a language model's layers.
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")


def load_causal_lm(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    num_ranks: int = 1,
    gguf_file: str | None = None,
    quantize: Quantize = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model and its tokenizer, or take a loaded one as it is.

    Parameters
    ----------
    source : str, path or PreTrainedModel
        A local directory, a hub id, or a loaded model, which keeps its device and dtype. The
        directory may be that of a LoRA adapter, which names its base; peft's `PeftModel` is the
        model that it wraps, its adapter included.
    dtype : torch.dtype or str
        The dtype of the weights; "auto" is the saved one. A loaded model allows only "auto".
    device : torch.device or str, optional
        Where to put the model; by default a GPU if there is one.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    allow_pickle : bool
        Whether weights may be loaded from pickled files, which can run code, where there are no
        safetensors.
    gguf_file : str, optional
        A GGUF file in the directory, which transformers reads in place of config, tokenizer and
        weights; these are dequantised to `dtype`.
    num_ranks : int
        Over how many ranks of ``torch.distributed`` to split the model, all of which load it; a
        loaded model must have been split so.
    quantize : str
        ``"int8"``: give a model that is loaded here 8-bit weights, once it is complete.

    Returns
    -------
    model : PreTrainedModel
        In eval mode if loaded here.
    tokenizer : PreTrainedTokenizerBase or None
        None if none was saved beside the model.

    Raises
    ------
    ModelLoadError
        If a directory or a file of it is missing, incomplete or damaged.
    UnsupportedModelError
        If it is not a causal language model, or cannot be split over `num_ranks`.
    ValueError
        If `dtype`, `device`, `num_ranks` or `quantize` contradicts a loaded model, or `quantize` a
        device.
    """
    source = adapted_model(source)
    if isinstance(source, PreTrainedModel) and gguf_file is not None:
        raise ValueError(f"gguf_file must be None with a loaded model, got {gguf_file!r}")
    if isinstance(source, PreTrainedModel):
        _check_shards(source, num_ranks)
        if quantize != "none":
            raise ValueError(f"quantize must be 'none' with a loaded model, got {quantize!r}")
        return _take_loaded(source, dtype, device, trust_remote_code)
    name = os.fspath(source)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_quantize(quantize, device=device, num_ranks=num_ranks)
    adapter = LoraAdapter.find(name) if gguf_file is None else None
    if adapter is not None:
        model, tokenizer = _load_adapted(
            adapter,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            num_ranks=num_ranks,
        )
        if quantize == "int8":
            quantize_model(model)
        ours(model)
        return model, tokenizer
    read: dict[str, Any] = {}
    if gguf_file is None:
        check_model_directory(name, allow_pickle=allow_pickle)
        read["use_safetensors"] = None if allow_pickle else True
    else:
        _check_gguf(name, gguf_file, num_ranks)
        read["gguf_file"] = gguf_file
    config = _load_config(name, trust_remote_code, gguf_file)
    if num_ranks > 1 and (reason := why_not_sharded(config, num_ranks)):
        raise UnsupportedModelError(f"model {name!r} cannot be tensor-parallel: {reason}")
    tokenizer = _saved_tokenizer(name, trust_remote_code, gguf_file)
    try:
        with bars_on_terminals_only():
            kind = AutoModelForCausalLM if _is_causal(config) else AutoModelForImageTextToText
            loaded: Any = kind.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                **read,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,  # makes the result a pair
                **loading_options(num_ranks),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"model {name!r}: {error}") from error
    model = (loaded[0] if num_ranks > 1 else loaded[0].to(device)).eval()
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        shown = ", ".join(missing[:4]) + (" and others" if len(missing) > 4 else "")
        raise ModelLoadError(
            f"model {name!r} has no weights for {shown} of {type(model).__name__}; transformers "
            "would make them up at random"
        )
    if quantize == "int8":
        quantize_model(model)
    ours(model)
    return model, tokenizer


def _load_adapted(
    adapter: LoraAdapter,
    *,
    num_ranks: int,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the base of an adapter, and merge that into it."""
    task = adapter.fields.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(f"{adapter.name} has task_type {task!r}: no language model")
    if num_ranks > 1:
        raise UnsupportedModelError(
            f"{adapter.name} cannot be tensor-parallel: merge it into its base, and give the "
            "merged model"
        )
    try:
        model, tokenizer = load_causal_lm(adapter.base, **options)
    except ModelLoadError as error:
        raise ModelLoadError(f"the base of {adapter.name}: {error}") from error
    adapter.merge(model, adapter.weights())
    if adapter.tokenizer_source != adapter.base:
        trust = options["trust_remote_code"]
        tokenizer = load_tokenizer(adapter.tokenizer_source, trust_remote_code=trust)
    return model, tokenizer


def adapted_model(model: Any) -> Any:  # noqa: ANN401 - whatever the user gave
    """Return the model inside of peft's `PeftModel`, with the adapter in it; others as they are."""
    inside: Any = getattr(model, "get_base_model", None)
    return inside() if isinstance(model, nn.Module) and inside is not None else model


def _check_gguf(name: str, gguf_file: str, num_ranks: int) -> None:
    """Check that a GGUF file is there, and what reads it."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelLoadError(f"gguf_file={gguf_file!r} needs {package}: pip install {package}")
    if Path(name).is_dir() and not (Path(name) / gguf_file).is_file():
        raise ModelLoadError(f"model directory {name!r} has no file {gguf_file!r}")
    if num_ranks > 1:
        raise UnsupportedModelError(f"gguf_file={gguf_file!r} cannot be tensor-parallel")


def _load_config(name: str, trust_remote_code: bool, gguf_file: str | None) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code, gguf_file=gguf_file
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"model {name!r}: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    kind = f"model {name!r} (model type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder, not a causal language model: only decoders keep one "
            "cache"
        )
    names = config.architectures or []
    if names and names[0].endswith(_CLASSIFIERS):
        raise UnsupportedModelError(
            f"model {name!r} is a {names[0]}: it scores texts and has no language-model head; pass "
            "it as the reward model"
        )
    if not _is_causal(config) and config.model_type not in SEEING:
        raise UnsupportedModelError(f"{kind} has no causal language model in transformers")
    return config


def _is_causal(config: PreTrainedConfig) -> bool:
    """Whether transformers has a causal language model of a model type, or its own code has."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or own_code


def _saved_tokenizer(
    name: str, trust_remote_code: bool, gguf_file: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model; None if there is none."""
    if gguf_file is not None:
        return load_tokenizer(name, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
    folder = Path(name)
    if folder.is_dir() and not any(
        path.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece"))
        for path in folder.iterdir()
    ):
        return None
    return load_tokenizer(name, trust_remote_code=trust_remote_code)


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or a hub id, or the one in a GGUF file there.

    Raises
    ------
    ModelLoadError
        There is none, or it cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, gguf_file=gguf_file
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelLoadError(f"tokenizer of {name!r}: {error}") from error
    return tokenizer


def _check_shards(model: PreTrainedModel, num_ranks: int) -> None:
    shards = num_shards(model)
    if shards == num_ranks:
        return
    if num_ranks == 1:
        raise ValueError(f"model is split over {shards} ranks: pass tensor_parallel=True on each")
    raise ValueError(
        f"model must be split over the {num_ranks} ranks there are, got one on {shards}: load it "
        "with distributed_config=DistributedConfig(tp_plan='auto'), or pass its directory"
    )


def _take_loaded(
    model: PreTrainedModel,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and wanted != model.dtype:
        raise ValueError(
            f"dtype must be 'auto' or the dtype of the loaded model, {model.dtype}, got {dtype}"
        )
    if device is not None and not same_device(torch.device(device), model.device):
        raise ValueError(
            f"device must be None or the device of the loaded model, {model.device}, got {device}"
        )
    if not has_lm_head(model):
        raise UnsupportedModelError(f"{type(model).__name__} has no language-model head")
    theirs(model)
    folder = model.name_or_path
    if not folder or not Path(folder).exists():
        return model, None
    return model, _saved_tokenizer(folder, trust_remote_code)


def check_device(name: str, device: str | torch.device | None) -> None:
    """Raise ValueError if torch knows no such device, or has none here; `name` is the option's."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name} must be None or a device that is here, such as 'cpu' or 'cuda', got "
            f"{str(device)!r}: {reason}"
        ) from None


def check_dtype(dtype: str | torch.dtype) -> None:
    """Raise ValueError if that is no precision of weights."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"dtype must be 'auto' or a floating-point dtype such as 'bfloat16', got {dtype!r}"
        )


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices agree, an index left out standing for any."""
    return one.type == other.type and (
        one.index is None or other.index is None or one.index == other.index
    )
