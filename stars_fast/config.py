"""Options of the engine other than its models, for Python, the command line, the server and Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from stars_fast.reward_head import RewardHead, RewardHeadLike
from stars_fast.text.chats import checked_kwargs

if TYPE_CHECKING:
    import os

    import torch
    from transformers import PreTrainedModel

__all__ = [
    "FLAGS",
    "UNIFORM",
    "Attention",
    "Backend",
    "Combine",
    "EngineConfig",
    "KvDtype",
    "LanguageModelLike",
]
__all__ += ["Quantize", "TemplateLike", "check_combine", "check_quantize_name"]

#: How several rewards become one.
Combine = Literal["sum", "min", "mean_minus_std"]
Backend = Literal["auto", "pytorch", "triton"]
#: Who attends in passes of many tokens: prompts, and what a reward model reads.
Attention = Literal["auto", "triton", "flash", "torch"]
KvDtype = Literal["auto", "fp8"]
Quantize = Literal["none", "int8"]
#: What `Engine` and the reward models take as `reward_template`.
TemplateLike: TypeAlias = "str | Callable[..., Any] | None"
#: As `guide_reference`, a reference that gives every token the same chance.
UNIFORM = "uniform"
#: A directory, a hub id, or a loaded model.
LanguageModelLike: TypeAlias = "str | os.PathLike[str] | PreTrainedModel"


def _flag(
    text: str, group: str = "models", metavar: str | None = None, flag: str | None = None
) -> dict[str, str | None]:
    """Metadata of an option that is also a command line flag, with its help text.

    `flag`: its name on the command line; None: the option's own.
    """
    return {"text": text, "group": group, "metavar": metavar, "flag": flag}


@dataclass(frozen=True)
class EngineConfig:
    """Keyword arguments of `Engine` without models and tokenizers; `Engine` describes them.

    Raises
    ------
    ValueError
        At construction, for a number out of range or options that exclude each other.
    TypeError
        At construction, if `reward_head` is neither None, a `RewardHead` nor text.
    """

    gguf_file: str | None = field(
        default=None,
        metadata=_flag(
            "GGUF file in the language model's directory to read it from, dequantised",
            metavar="FILE",
        ),
    )
    reward_template: TemplateLike = field(
        default=None,
        metadata=_flag(
            "what the reward model reads: chat, plain, or text with {prompt} and {response} "
            "(default: its chat template if it has one)",
            metavar="TEXT",
        ),
    )
    chat_template_kwargs: Mapping[str, Any] | None = field(
        default=None,
        metadata=_flag(
            'variables of the chat template, such as {"enable_thinking": false}', metavar="JSON"
        ),
    )
    reward_head: RewardHeadLike = field(
        default=None,
        metadata=_flag(
            "what of the reward model's head is the reward: label=NAME, "
            "label=NAME,activation=log_odds, label_weights={JSON}, token=TEXT or "
            'tokens=["YES", "NO"], with at=steps,step_tag=TEXT,aggregate=min at each step '
            "(default: its one label)",
            metavar="SPEC",
        ),
    )
    combine: Combine = field(
        default="sum",
        metadata=_flag(
            "how several rewards become one, after their weights (default: sum)",
            flag="reward-combine",
        ),
    )
    combine_stds: float = field(
        default=1.0,
        metadata=_flag(
            "standard deviations that mean_minus_std takes off (default: 1)",
            metavar="FLOAT",
            flag="reward-combine-stds",
        ),
    )
    guide: LanguageModelLike | None = field(
        default=None,
        metadata=_flag(
            "language model whose log-ratio to --guide-reference, times --guide-weight, is added "
            "to the logits",
            metavar="DIR_OR_HUB_ID",
        ),
    )
    guide_reference: LanguageModelLike | None = field(
        default=None,
        metadata=_flag(
            "what the guide is compared with: a language model, or uniform, nothing (default: the "
            "model that it guides)",
            metavar="DIR_OR_HUB_ID",
        ),
    )
    draft_model: LanguageModelLike | None = field(
        default=None,
        metadata=_flag(
            "smaller language model that drafts for the methods rsd, gsi and sss",
            metavar="DIR_OR_HUB_ID",
        ),
    )
    draft_reference: LanguageModelLike | None = field(
        default=None,
        metadata=_flag(
            "that model before it was aligned, for sss (default: itself)",
            metavar="DIR_OR_HUB_ID",
        ),
    )
    dtype: str | torch.dtype = field(
        default="auto",
        metadata=_flag("dtype of the weights, such as bfloat16 (default: the model's)"),
    )
    quantize: Quantize = field(
        default="none",
        metadata=_flag("int8: 8-bit weights, for models on a CPU (default: none)"),
    )
    reward_quantize: Quantize | None = field(
        default=None, metadata=_flag("likewise of the reward model (default: as --quantize)")
    )
    device: str | torch.device | None = field(
        default=None, metadata=_flag("cpu or cuda, for example (default: cuda if there is one)")
    )
    reward_device: str | torch.device | None = field(
        default=None,
        metadata=_flag(
            "device of the reward model (default: that of the model); on a device of its own, "
            "scoring runs beside the next draft",
        ),
    )
    reward_timeout: float | None = field(
        default=None,
        metadata=_flag(
            "seconds that a call of a reward function or server may take (default: no limit)",
            metavar="FLOAT",
        ),
    )
    compile_model: bool = field(
        default=False, metadata=_flag("fuse small operations with torch.compile")
    )
    trust_remote_code: bool = field(
        default=False, metadata=_flag("run Python code that comes with a model")
    )
    allow_pickle: bool = field(
        default=False,
        metadata=_flag("load weights that are not safetensors; unpickling can run code"),
    )
    parse_special: bool = field(
        default=False,
        metadata=_flag(
            "special tokens written in prompts are special tokens, and not text; for prompts that "
            "a chat template has written"
        ),
    )
    attention: Attention = field(
        default="auto",
        metadata=_flag(
            "who attends to prompts and to what the reward model reads: triton, this project's "
            "kernels; flash, the package flash-attn; torch, PyTorch (default: auto)"
        ),
    )
    page_size: int = field(
        default=16, metadata=_flag("tokens per page (default: 16)", "memory", "INT")
    )
    num_pages: int | None = field(
        default=None,
        metadata=_flag("pages of the model's pool (default: as memory allows)", "memory", "INT"),
    )
    kv_dtype: KvDtype = field(
        default="auto",
        metadata=_flag(
            "dtype of the pages; fp8 halves bfloat16 pages, on a GPU (default: the model's dtype)",
            "memory",
        ),
    )
    max_rows: int = field(
        default=256, metadata=_flag("rows per round (default: 256)", "memory", "INT")
    )
    reward_num_pages: int | None = field(
        default=None,
        metadata=_flag(
            "pages of the reward model's pool (default: as --num-pages, from what is left)",
            "memory",
            "INT",
        ),
    )
    seed: int = 0
    prefix_caching: bool = True
    max_prefill_tokens: int = 8192
    backend: Backend = "auto"
    overlap_scoring: bool | None = None
    draft_ahead: bool | None = None
    device_timing: bool = False
    tensor_parallel: bool = False

    def __post_init__(self) -> None:
        if self.chat_template_kwargs is not None:
            checked_kwargs(self.chat_template_kwargs)
        RewardHead.of(self.reward_head)
        check_combine(self.combine, self.combine_stds)
        check_attention(self.attention)
        if self.guide is None and self.guide_reference is not None:
            raise ValueError(
                f"guide_reference must be None without a guide, got {self.guide_reference!r:.80}"
            )
        if self.draft_model is None and self.draft_reference is not None:
            raise ValueError(
                "draft_reference must be None without a draft_model, got "
                f"{self.draft_reference!r:.80}"
            )
        if self.guide is not None and self.draft_model is not None:
            raise ValueError("guide must be None with a draft_model: one of them runs beside")
        for name in ("guide", "draft_model"):
            if getattr(self, name) is not None and self.tensor_parallel:
                raise ValueError(f"{name} must be None with tensor_parallel=True")
        for name in ("quantize", "reward_quantize"):
            self._check_quantize(name)
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {self.page_size}")
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {self.max_rows}")
        if self.num_pages is not None and self.num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 or None, got {self.num_pages}")
        if self.reward_num_pages is not None and self.reward_num_pages < 2:
            raise ValueError(
                f"reward_num_pages must be at least 2 or None, got {self.reward_num_pages}"
            )
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(f"reward_timeout must be above 0 or None, got {self.reward_timeout}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")

    def _check_quantize(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name == "reward_quantize":
            return
        check_quantize_name(name, value, self.dtype)
        if value != "none" and self.compile_model:
            raise ValueError(f"compile_model must be off with {name}={value!r}, got True")


def check_attention(attention: object) -> None:
    """Raise ValueError for an attention that there is not."""
    if attention not in get_args(Attention):
        raise ValueError(
            f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}"
        )


def check_quantize_name(name: str, value: object, dtype: object) -> None:
    """Raise ValueError for weights that there are not, or not in a dtype; `name` says whose."""
    if value not in get_args(Quantize):
        raise ValueError(f"{name} must be one of {', '.join(get_args(Quantize))}, got {value!r}")
    if value != "none" and str(dtype) not in ("auto", "float32", "torch.float32"):
        raise ValueError(f"dtype must be 'auto' or 'float32' with {name}={value!r}, got {dtype!r}")


def check_combine(combine: object, stds: float) -> None:
    """Raise ValueError for a way of combining rewards that there is not."""
    if combine not in get_args(Combine):
        raise ValueError(f"combine must be one of {', '.join(get_args(Combine))}, got {combine!r}")
    if not 0 <= stds < math.inf:
        raise ValueError(f"combine_stds must be finite and at least 0, got {stds}")


#: Options that are flags of the commands, by name.
FLAGS = {field.name: field for field in fields(EngineConfig) if field.metadata}
