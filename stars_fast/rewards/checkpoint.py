"""A saved reward model before it is loaded: its configuration, its weights' names and shapes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from stars_fast.config import Quantize
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.files import check_model_directory, read_json
from stars_fast.models.packed import ours
from stars_fast.models.quantize import quantize_model
from stars_fast.models.sharded import loading_options

__all__ = ["CALLABLE_ADVICE", "HEAD_FILES", "Checkpoint", "LoadedModels", "Loading"]

CALLABLE_ADVICE = (
    "pass as reward_model a function f(prompts, responses) -> list[float] that loads and calls it"
)
#: LLaMA-Factory keeps the head in a file of its own.
HEAD_FILES = ("value_head.safetensors", "v_head.safetensors")
#: Weights that no reward depends on: a language model's head, statistics of training.
_UNUSED = ("lm_head.", "normalizer.")


#: Models and what their loading reports, by class, source and device.
LoadedModels: TypeAlias = dict[tuple[Any, str, str], tuple[PreTrainedModel, dict[str, Any]]]


@dataclass(frozen=True)
class Loading:
    """How weights are loaded.

    Parameters
    ----------
    device, dtype
        Where to, and as what; dtype "auto" is the one they were saved in.
    allow_pickle
        Whether other files than safetensors may be read.
    num_ranks
        Over how many ranks the model is split.
    quantize
        Whether it gets 8-bit weights: "none" or "int8".
    loaded
        What has been loaded, for further heads of the same models.
    """

    device: torch.device | str | None
    dtype: torch.dtype | str
    allow_pickle: bool
    num_ranks: int
    quantize: Quantize = "none"
    loaded: LoadedModels = field(default_factory=dict, compare=False)

    def model(
        self,
        auto_class: Any,  # noqa: ANN401 - one of transformers' Auto classes
        source: str,
        config: PretrainedConfig,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Load a model of transformers' own classes, in eval mode, or return it if it is loaded.

        Returns
        -------
        model : PreTrainedModel
        report : dict
            Its ``missing_keys`` and ``unexpected_keys``.

        Raises
        ------
        ModelLoadError
            If files are missing or damaged, or do not fit.
        """
        key = auto_class, str(Path(source).resolve()), str(self.device)
        if key in self.loaded:
            return self.loaded[key]
        try:
            with _no_report():
                model, report = auto_class.from_pretrained(
                    source,
                    config=config,
                    dtype=self.dtype,
                    use_safetensors=None if self.allow_pickle else True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **loading_options(self.num_ranks),
                )
        except (OSError, ValueError, RuntimeError) as error:
            hint = "" if self.allow_pickle else _PICKLE_HINT
            raise ModelLoadError(f"reward model {source!r}: {error}{hint}") from error
        placed = model if self.num_ranks > 1 else model.to(self.device or "cpu")
        if self.quantize == "int8":
            quantize_model(placed)
        ours(placed)
        self.loaded[key] = placed.eval(), report
        return self.loaded[key]


@contextlib.contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from printing which weights it does not know: callers check them."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


_PICKLE_HINT = " (only safetensors are loaded unless allow_pickle=True)"


@dataclass(frozen=True)
class Checkpoint:
    """A saved model: what its configuration says, and its weights' names and shapes.

    Parameters
    ----------
    source : str
        Directory or hub id.
    config : PretrainedConfig
        Of one of transformers' own model types.
    architecture : str
        The class that saved it; empty if the configuration does not say.
    remote_code : bool
        Whether that class is in a file beside the weights.
    shapes : mapping of str to tuple of int
        Of the weights in safetensors; empty where there are none.
    files : tuple of Path
        Those safetensors.
    """

    source: str
    config: PretrainedConfig
    architecture: str
    remote_code: bool
    shapes: Mapping[str, tuple[int, ...]]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, source: str, *, allow_pickle: bool) -> Checkpoint:
        """Look at a directory or a hub id.

        Raises
        ------
        ModelLoadError
            If a file is missing or damaged.
        UnsupportedModelError
            If transformers has no model of its type.
        """
        check_model_directory(source, allow_pickle=allow_pickle)
        try:
            fields, _ = PretrainedConfig.get_config_dict(source)
        except OSError as error:
            raise ModelLoadError(f"reward model {source!r}: {error}") from error
        architecture = str((fields.get("architectures") or [""])[0])
        remote_code = bool(fields.get("auto_map"))
        kind = fields.get("model_type")
        if remote_code and kind not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"reward model {source!r} is {architecture}, of model type {kind!r}, which "
                "transformers does not have and which needs its own remote code: serve it "
                f"elsewhere and pass RemoteReward(url), or {CALLABLE_ADVICE}"
            )
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"reward model {source!r}: {error}") from error
        files = _weight_files(source)
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(weights.get_slice(name).get_shape())
        return cls(source, config, architecture, remote_code, shapes, files)

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return f"reward model {self.source!r}"

    def starting_with(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights below a prefix, by the rest of their names."""
        return {
            name.removeprefix(prefix): shape
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }

    def tensors(self, prefix: str, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the weights below a prefix in float32, by the rest of their names."""
        found = {}
        for path in self.files:
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    if name.startswith(prefix):
                        tensor = weights.get_tensor(name).to(device, torch.float32)
                        found[name.removeprefix(prefix)] = tensor
        return found

    def backbone(self, how: Loading, heads: tuple[str, ...]) -> PreTrainedModel:
        """Load the model without its head.

        Parameters
        ----------
        how : Loading
        heads : tuple of str
            Prefixes of the weights that the caller reads.

        Raises
        ------
        ModelLoadError
            If a weight is missing, or one is there that nothing reads.
        """
        model, report = how.model(AutoModel, self.source, self.config)
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelLoadError(
                f"{self.name} has no weights for {_some(missing)} of {type(model).__name__}"
            )
        known = (*heads, *_UNUSED)
        unread = sorted(
            key
            for key in report["unexpected_keys"]
            if not key.startswith(known) and not key.endswith("rotary_emb.inv_freq")
        )
        if unread:
            raise ModelLoadError(
                f"{self.name} has weights that nothing here reads ({_some(unread)}): "
                f"{CALLABLE_ADVICE}"
            )
        return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")


def _weight_files(source: str) -> tuple[Path, ...]:
    """Return the safetensors of a model, the head's own file last."""
    names = []
    index = _file(source, "model.safetensors.index.json")
    if _file(source, "model.safetensors") is not None:
        names = ["model.safetensors"]
    elif index is not None:
        names = sorted(set(read_json(index)["weight_map"].values()))
    if not names:
        return ()
    paths = (_file(source, name) for name in (*names, *HEAD_FILES))
    return tuple(path for path in paths if path is not None)


def _file(source: str, name: str) -> Path | None:
    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"reward model {source!r}: {error}") from error
    return None if found is None else Path(found)
