"""Loading what a model that sees images reads them with."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from stars_fast.models.images import SEEING
from stars_fast.text.image_prompts import ImageReader

__all__ = ["image_reader", "images_only", "load_processor"]


def image_reader(
    source: str | os.PathLike[str] | PreTrainedModel,
    config: PreTrainedConfig,
    processor: ProcessorMixin | None = None,
    *,
    trust_remote_code: bool = False,
) -> ImageReader | str | None:
    """Return what reads the pictures of prompts, or why nothing does; None: the model sees none.

    Parameters
    ----------
    source, config
        A model's directory, hub id or the model itself, and its configuration.
    processor
        None: loaded from `source`.

    Raises
    ------
    ValueError
        There is a processor for a model that sees none.
    """
    if config.model_type not in SEEING:
        if processor is not None:
            raise ValueError(
                f"processor must be None with a {config.model_type}, which sees no images"
            )
        return None
    found = processor or load_processor(source, trust_remote_code=trust_remote_code)
    if isinstance(found, str):
        return found
    return ImageReader(found, config.model_type, int(config.image_token_id))


def load_processor(
    source: str | os.PathLike[str] | PreTrainedModel, *, trust_remote_code: bool = False
) -> Any:  # noqa: ANN401 - transformers types no processor
    """Return the processor of a model's directory or hub id; a text says why there is none.

    Its part for videos, which needs torchvision, is left out where that is not installed.
    """
    if find_spec("PIL") is None:
        return "they need Pillow: pip install 'stars_fast[images]'"
    name: Any = source.name_or_path if isinstance(source, PreTrainedModel) else os.fspath(source)
    options = {"trust_remote_code": trust_remote_code}
    loader: Any = AutoProcessor
    try:
        if find_spec("torchvision") is None:
            config = type(AutoConfig.from_pretrained(name, **options))
            loader = images_only(PROCESSOR_MAPPING[config])
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        return f"the model's processor cannot be loaded: {error}"


def images_only(kind: Any) -> Any:  # noqa: ANN401
    """Return a class of processors without their part for videos."""
    if "video_processor" not in kind.get_attributes():
        return kind

    def get_attributes(_: object) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    def init(self: object, *parts: object, **options: object) -> None:
        kind.__init__(self, *parts, video_processor=None, **options)

    def reduce(self: object) -> tuple[Any, ...]:
        return _blank, (kind,), self.__dict__

    members = {
        "get_attributes": classmethod(get_attributes),
        "__init__": init,
        "__reduce__": reduce,  # pickle finds no class that was made here
    }
    return type(kind.__name__, (kind,), members)


def _blank(kind: Any) -> Any:  # noqa: ANN401
    made = images_only(kind)
    return made.__new__(made)
