"""The models of an eval: their sources, and loading them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from stars_fast.eval.gold import RewardFunction, TextScorer
from stars_fast.reward import Reward
from stars_fast.reward_head import RewardHeadLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stars_fast.engine import Engine
    from stars_fast.rewards.log_ratio import LogRatio
    from stars_fast.rewards.persona import Persona
    from stars_fast.text.image_prompts import ImageReader

RewardSource: TypeAlias = "str | RewardFunction | LogRatio | Persona | list[Reward]"

#: Options of `Engine` that a result depends on, beside the models.
_MATTER = (
    "dtype", "quantize", "reward_quantize", "kv_dtype", "reward_template", "reward_head",
    "compile_model", "attention", "guide", "guide_reference", "draft_model", "draft_reference",
)  # fmt: skip
#: Of these, what is of no matter to one reward model.
_OF_SEVERAL = ("combine", "combine_stds")

#: Options of `Engine` that the scorer of whole responses also takes.
_OF_SCORER = ("dtype", "trust_remote_code", "allow_pickle", "max_rows", "page_size")


@dataclass(frozen=True)
class Models:
    """Sources of the models.

    Attributes
    ----------
    model
        The base model.
    reward_model
        The decoding reward model; None: none is needed.
    lms, rms
        Other language models and reward models, by name.
    options
        Options of `Engine`.
    """

    model: str
    reward_model: RewardSource | None
    lms: Mapping[str, str] = field(default_factory=dict)
    rms: Mapping[str, RewardSource] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def engine(self, lm: str | None, rm: str | None) -> Engine:
        """Load the engine of a language model and a reward model; None is the base's.

        Raises
        ------
        StarsFastError, ValueError, TypeError
            As `Engine`.
        """
        from stars_fast.engine import Engine

        options = {**self.options}
        if lm is not None:
            options["gguf_file"] = None  # the base's
        if rm is None:
            return Engine(self._lm(lm), reward_model=self.reward_model, **options)
        # Template and head are those of the eval's own reward model.
        options |= {"reward_template": None, "reward_head": None}
        return Engine(self._lm(lm), reward_model=self.rms[rm], **options)

    def scorer(
        self, source: RewardSource, template: str | None = None, head: RewardHeadLike = None
    ) -> TextScorer:
        """Load what scores whole responses.

        Raises
        ------
        StarsFastError, ValueError, TypeError
            As `Engine` for a reward model.
        """
        import torch

        from stars_fast.rewards.load_several import load_rewards
        from stars_fast.rewards.log_ratio import LogRatio

        names = (*_OF_SCORER, *_OF_SEVERAL)
        options = {name: self.options[name] for name in names if name in self.options}
        options["num_pages"] = self.options.get("reward_num_pages")
        device = self.options.get("reward_device") or self.options.get("device")
        tokenizer = self.tokenizer(None)
        reader = self._image_reader()
        # The reference of a log-ratio, or by its type what tells which models see its images.
        with_base = (
            isinstance(source, LogRatio) and source.reference is None
        ) or reader is not None
        scorer = load_rewards(
            source,
            lm_tokenizer=tokenizer,
            language_model=self.base()[0] if with_base else None,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            template=template,
            head=head,
            **options,
        )
        return TextScorer(scorer, tokenizer, reader)

    def _image_reader(self) -> ImageReader | str | None:
        from transformers import AutoConfig

        from stars_fast.models.processor import image_reader

        if self.options.get("gguf_file"):
            return None
        trust = bool(self.options.get("trust_remote_code"))
        config = AutoConfig.from_pretrained(self.model, trust_remote_code=trust)
        return image_reader(self.model, config, trust_remote_code=trust)

    def base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """Load the base as transformers has it."""
        from stars_fast.models.load import load_causal_lm

        names = ("dtype", "device", "trust_remote_code", "allow_pickle", "gguf_file")
        options = {name: self.options[name] for name in names if name in self.options}
        return load_causal_lm(self.model, **options)

    def tokenizer(self, lm: str | None) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer of a language model."""
        from stars_fast.models.load import load_tokenizer

        trust = bool(self.options.get("trust_remote_code"))
        file = None if lm is not None else self.options.get("gguf_file")
        return load_tokenizer(self._lm(lm), trust_remote_code=trust, gguf_file=file)

    def same_tokens(self, lm: str | None) -> bool:
        """Whether token ids of a language model mean the same to the base."""
        from stars_fast.rewards.vocabulary import same_tokens

        ours, base = self.tokenizer(lm), self.tokenizer(None)
        return ours is not None and base is not None and same_tokens(ours, base)

    def identity(self) -> dict[str, Any]:
        """Return the options that results depend on, JSON values."""
        names = (*_MATTER, *_OF_SEVERAL) if isinstance(self.reward_model, list) else _MATTER
        return {name: self.options.get(name) for name in names}

    def _lm(self, name: str | None) -> str:
        return self.model if name is None else self.lms[name]


def identity_of(source: RewardSource | None) -> Any:  # noqa: ANN401 - JSON
    """Return what tells a model apart from others, JSON values.

    Also the sizes and times of its files, weights or code: a model trained again into the same
    directory is another one.
    """
    if source is None:
        return None
    if isinstance(source, list):
        return [[repr(one), identity_of(one.model)] for one in source]
    if isinstance(source, str):
        name, files = source, _weights(source)
    elif inspect.isfunction(source):
        name = f"{source.__module__}:{source.__qualname__}"
        files = [Path(inspect.unwrap(source).__code__.co_filename)]  # not a decorator's
    else:
        name, files = repr(source), [f for each in sources_of(source) for f in _weights(each)]
    stats = [(path.name, path.stat()) for path in sorted(files) if path.exists()]
    return [name, [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]]


def sources_of(source: object) -> list[str]:
    """Return the directories and hub ids of the models that a `LogRatio` is made of."""
    models = (getattr(source, "policy", None), getattr(source, "reference", None))
    return [model for model in models if isinstance(model, str)]


def _weights(source: str) -> list[Path]:
    return [*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]
