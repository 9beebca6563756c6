"""The engine on models that are here."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from stars_fast import _core
from stars_fast.config import (
    Attention,
    Backend,
    Combine,
    EngineConfig,
    KvDtype,
    LanguageModelLike,
    Quantize,
    TemplateLike,
)
from stars_fast.distributed import ALONE, OneRank, Ranks
from stars_fast.drafting.adjust import KnownTokens, num_tokens
from stars_fast.drafting.base import Drafter, LaunchingDrafter
from stars_fast.drafting.eager import EagerDrafter
from stars_fast.drafting.grammar import Grammars
from stars_fast.drafting.guidance import GuidedDrafter
from stars_fast.drafting.pace import Pace
from stars_fast.drafting.paired import PairedDrafter
from stars_fast.drafting.plan_rows import RowDrafter
from stars_fast.drafting.segment_ends import segment_end_levels
from stars_fast.engine.batches import BatchEngine
from stars_fast.engine.beside import in_lockstep, load_beside
from stars_fast.engine.clock import PhaseClock
from stars_fast.engine.generation_defaults import GenerationDefaults
from stars_fast.engine.limits import Limits
from stars_fast.engine.loop import PHASES, Loop
from stars_fast.engine.one_thread import one_thread
from stars_fast.engine.prompt_scores import prompt_scores
from stars_fast.models.drafted import DraftedModel
from stars_fast.models.guidance import GuidedModel
from stars_fast.models.images import ImageEncoder, sees_images
from stars_fast.models.load import check_device, check_dtype, load_causal_lm
from stars_fast.models.logits import LogitHead
from stars_fast.models.machine import bound_kernel_caches
from stars_fast.models.paged import PagedModel
from stars_fast.models.pool import default_num_pages
from stars_fast.models.processor import image_reader
from stars_fast.models.selfcheck import check_numbers
from stars_fast.outputs import TokenScore
from stars_fast.params import StarsParams
from stars_fast.prompts import PromptReader
from stars_fast.reward_head import RewardHeadLike
from stars_fast.rewards.base import Scorer
from stars_fast.rewards.load_several import RewardModelsLike, load_rewards, named_rewards
from stars_fast.rewards.on_ranks import load_on_ranks
from stars_fast.rewards.persona import Persona
from stars_fast.text.image_prompts import ImageReader

_log = logging.getLogger(__name__)

#: Rows that cost as much as a round's fixed part (reading the weights), until that is measured.
FIXED_COST_ROWS = {"cpu": 16.0, "cuda": 256.0}

#: Part of a GPU's free memory that the language model's pool takes by default.
LM_POOL_SHARE = 0.5


class Engine(BatchEngine):
    """Aligns a language model to a reward model while it decodes (STARS, arXiv 2511.03827).

    Parameters
    ----------
    model
        A local directory, a hub id, or a loaded transformers causal LM. A loaded model is left as
        it is: its attention is switched only while the engine's own passes run.
    reward_model
        A directory, a hub id, a loaded sequence classifier, a `LogRatio` of two language models, a
        callable ``f(prompts: list[str], responses: list[str]) -> list[float]``, an object with such
        a method `score`, or None: then only ``method="vanilla"`` can be run. The directory of a
        LoRA adapter whose base is `model` shares its weights. A list of `Reward` is several at once
        (docs/rewards.md).
    guide, guide_reference
        Language models, as `model`: requests with a `guide_weight` are drawn from the model's
        distribution times (p_guide / p_reference) to that power. The reference is `model` itself
        where it is None, and ``"uniform"`` compares with nothing. Both have the tokens of `model`;
        the directory of a LoRA adapter whose base is `model` shares its weights. Each takes as many
        pages as `model` does (docs/guidance.md).
    draft_model, draft_reference
        A smaller language model that drafts for ``method="rsd"``, ``"gsi"`` and ``"sss"``, and what
        it was before it was aligned, for ``"sss"`` (docs/drafts.md). Tokens, adapters and pages as
        of a guide; not with one.
    tokenizer
        The language model's; None loads it from `model` if that is a directory or id.
    processor
        What a model that sees images reads them with; None loads it as the tokenizer
        (docs/images.md).
    device, dtype
        Device and precision of the models. None is the GPU if there is one, else the CPU;
        ``"auto"`` is the precision in which the weights are stored.
    quantize, reward_quantize
        ``"int8"`` gives the models that are loaded here 8-bit weights, on a CPU: a quarter of the
        memory of float32, and faster (docs/quantization.md). `dtype` must be "auto" or float32,
        which is what all but those weights become. The reward model's, None: as `quantize`. A
        reward model that comes loaded stays as it is.
    page_size
        Tokens per KV page, at least 1. Segments whose length it divides fork without a copy.
    num_pages
        Pages of the language model's pool; None: enough for `max_rows` rows, within half of a GPU's
        free memory or an eighth of the machine's. Allocated once.
    max_rows
        Most candidates drafted in one round, and most requests that run at once; twice as many
        run if scoring overlaps, in two halves.
    seed
        A request without a seed gets one from this and from the number of requests before it.
    gguf_file
        A GGUF file in the language model's directory, which transformers reads in place of its
        other files (packages gguf and accelerate). Its weights are dequantised to `dtype`, float32
        with ``"auto"``: the file saves disk, not memory.
    reward_template
        The text that the reward model reads: None (its chat template, else prompt and response
        joined), ``"chat"``, ``"plain"``, text with ``{prompt}`` and ``{response}``, or a callable
        (prompt, response) -> text.
    chat_template_kwargs
        Variables of the language model's chat template, such as ``{"enable_thinking": False}``,
        where a chat has none of its own.
    reward_head
        What part of the reward model's head is the reward: None, its one label; a `RewardHead`; or
        one as text, ``"label=safe"``.
    combine, combine_stds
        How several rewards become the one that is compared, after their weights: ``"sum"``,
        ``"min"``, or ``"mean_minus_std"``, the mean less `combine_stds` standard deviations.
    reward_tokenizer
        The reward model's; None loads it from the model's own source.
    reward_num_pages
        Pages of the reward model's pool; None: as `num_pages`, from what is left.
    reward_device
        Device of the reward model; None: that of the language model.
    reward_timeout
        Seconds that a call of a reward function or server may take, above 0; the requests that it
        was to score fail then, and the others go on. None: no limit. With one, the function runs on
        a thread of its own.
    prefix_caching
        Share full prompt pages between requests with the same prefix.
    max_prefill_tokens
        Most prompt tokens run in one round.
    backend
        Form of the operators: ``"auto"``, Triton on a CUDA device and PyTorch elsewhere;
        ``"pytorch"``; or ``"triton"``, which on a CPU is for tests of the kernels.
    attention
        Who attends in passes of many tokens, which are prompts and what reward models read, on the
        Triton backend: ``"triton"``, the kernels of this project; ``"flash"``, the package
        flash-attn; ``"torch"``, `torch.nn.attention.varlen`. The last two attend within each text,
        and a prefix that it shares with others is joined to that by log-sum-exp. ``"auto"`` takes
        flash-attn, else PyTorch's, where a batch has no such prefix and they are there and agree
        with this project's operators at load, and else the kernels. On other backends PyTorch's
        operators are all there is (docs/gpu.md).
    kv_dtype
        Dtype of the pages of both models: ``"auto"``, that of their keys and values, or ``"fp8"``,
        which takes half the memory of bfloat16, on the Triton backend.
    compile_model
        Fuse the small operations of both models with `torch.compile`. Off by default: the first
        rounds of each size wait for the compiler.
    overlap_scoring
        Draft a round while the previous one, of other requests, is scored on another thread; None:
        only if the reward model is on another device. This helps if the two do not share a
        processor: with another GPU, or with a reward function that calls a server.
    draft_ahead
        Launch a round's draft before `step` returns what the round before it decided: texts and
        outputs are made, and handed on, while the device drafts. A request that is added between
        two steps joins the round after the one under way; with `AsyncEngine` it is no later than
        otherwise. None: where drafts are replays of CUDA graphs and scoring does not overlap. Where
        a draft cannot be launched, on a CPU, it is run instead, and outputs wait for it.
    device_timing
        Take the seconds of `stats` from CUDA events, as the device sees each phase, at a few
        microseconds per phase. Otherwise the host's clock charges a phase with its waits.
    tensor_parallel
        Split the models over the processes that ``torchrun`` has started. Each makes this engine
        and the same calls, or follows (`lead`, `follow`). With one process, nothing changes.
    parse_special
        Special tokens written in prompts and messages, such as ``<|im_end|>``, are special tokens.
        Off, they are text, for the reward model as well, and only what the chat template writes is
        special. For prompts that a chat template has already written.
    trust_remote_code, allow_pickle
        Off unless asked for: run code that comes with a model; load weights that are not
        safetensors.

    Notes
    -----
    Not thread-safe: a call while another thread is inside one raises `ConcurrentCallError` and does
    nothing. `AsyncEngine` takes requests from many threads.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        reward_model: RewardModelsLike | None = None,
        *,
        guide: LanguageModelLike | None = None,
        guide_reference: LanguageModelLike | None = None,
        draft_model: LanguageModelLike | None = None,
        draft_reference: LanguageModelLike | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: ProcessorMixin | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        quantize: Quantize = "none",
        reward_quantize: Quantize | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        max_rows: int = 256,
        seed: int = 0,
        gguf_file: str | None = None,
        reward_template: TemplateLike = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reward_head: RewardHeadLike = None,
        combine: Combine = "sum",
        combine_stds: float = 1.0,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        reward_num_pages: int | None = None,
        reward_device: str | torch.device | None = None,
        reward_timeout: float | None = None,
        prefix_caching: bool = True,
        max_prefill_tokens: int = 8192,
        backend: Backend = "auto",
        attention: Attention = "auto",
        kv_dtype: KvDtype = "auto",
        compile_model: bool = False,
        overlap_scoring: bool | None = None,
        draft_ahead: bool | None = None,
        device_timing: bool = False,
        tensor_parallel: bool = False,
        parse_special: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        config = EngineConfig(
            guide=guide,
            guide_reference=guide_reference,
            draft_model=draft_model,
            draft_reference=draft_reference,
            device=device,
            dtype=dtype,
            quantize=quantize,
            reward_quantize=reward_quantize,
            page_size=page_size,
            num_pages=num_pages,
            max_rows=max_rows,
            seed=seed,
            gguf_file=gguf_file,
            reward_template=reward_template,
            chat_template_kwargs=chat_template_kwargs,
            reward_head=reward_head,
            combine=combine,
            combine_stds=combine_stds,
            reward_num_pages=reward_num_pages,
            reward_device=reward_device,
            reward_timeout=reward_timeout,
            prefix_caching=prefix_caching,
            max_prefill_tokens=max_prefill_tokens,
            backend=backend,
            attention=attention,
            kv_dtype=kv_dtype,
            compile_model=compile_model,
            overlap_scoring=overlap_scoring,
            draft_ahead=draft_ahead,
            device_timing=device_timing,
            tensor_parallel=tensor_parallel,
            parse_special=parse_special,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        bound_kernel_caches()
        check_device("device", device)
        check_device("reward_device", reward_device)
        several = named_rewards(
            reward_model,
            template=reward_template,
            head=reward_head,
            reward_tokenizer=reward_tokenizer,
        )
        for reward in several or ():
            check_device(f"device of reward {reward.name!r}", reward.device)
        check_dtype(dtype)
        ranks = _connected(config)
        loaded, found_tokenizer = load_causal_lm(
            model,
            dtype=dtype,
            device=ranks.device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            num_ranks=ranks.size,
            gguf_file=gguf_file,
            quantize=quantize,
        )
        tokenizer = tokenizer if tokenizer is not None else found_tokenizer
        reader = image_reader(model, loaded.config, processor, trust_remote_code=trust_remote_code)
        if isinstance(reader, ImageReader):
            tokenizer = reader.tokenizer if tokenizer is None else tokenizer
            if not tokenizer.chat_template:
                tokenizer.chat_template = reader.chat_template
        named = {
            name: getattr(config, name)
            for name in ("guide", "guide_reference", "draft_model", "draft_reference")
        }
        beside = load_beside(named, config, loaded, tokenizer, _source_of(model, config))
        models = [one.model for one in beside]
        encoder = ImageEncoder(loaded, models) if sees_images(loaded) else None
        lm = _on_pages(loaded, config, ranks, models)
        together = in_lockstep(lm, beside, config)
        scorer = _scorer_for(
            reward_model, config, lm, _source_of(model, config), tokenizer, reward_tokenizer, ranks
        )
        judges = isinstance(reward_model, Persona)
        overlap = _overlaps(config, ranks, lm, scorer, judges=judges)
        scheduler = _core.Scheduler(
            num_pages=lm.num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_prefill_tokens=max_prefill_tokens,
            prefix_caching=prefix_caching,
            fixed_cost_rows=FIXED_COST_ROWS.get(lm.device.type, 16.0),
            lanes=2 if overlap else 1,
        )
        known = _known_tokens(tokenizer, lm)
        eos_ids = _eos_token_ids(loaded, tokenizer)
        self._grammars = Grammars(tokenizer, eos_ids)
        segment_ends = _segment_ends_of(tokenizer, lm)
        pace = Pace()
        own = make_drafter(lm, segment_ends, ranks, known, pace, max_rows)
        drafter: Drafter = own
        if isinstance(together, GuidedModel):
            drafter = GuidedDrafter(together, own, segment_ends, known)
        elif isinstance(together, DraftedModel):
            drafter = _paired_drafter(together, own, tokenizer, ranks, max_rows)
        loop = Loop(
            lm if together is None else together,
            drafter,
            scheduler,
            scorer,
            tokenizer,
            PhaseClock(PHASES, lm.device if device_timing else None),
            overlap=overlap,
            ranks=ranks,
            grammars=self._grammars,
            pace=pace,
            images=encoder,
            ahead=_drafts_ahead(config, ranks, lm, drafter, overlap=overlap),
        )
        self._lm = lm
        self._max_length = lm.max_length if together is None else together.max_length
        self._logit_head: LogitHead | None = None
        self._generation_defaults = GenerationDefaults(getattr(loaded, "generation_config", None))
        super().__init__(
            PromptReader(
                tokenizer,
                lm.vocab_size,
                self._max_length,
                chat_template_kwargs,
                parse_special=parse_special,
                images=reader,
            ),
            loop,
            Limits(
                lm.vocab_size,
                max_rows,
                tokenizer is not None,
                scorer,
                judges,
                num_tokens=num_tokens(lm.vocab_size, known),
                eos_ids=eos_ids,
                guides=isinstance(together, GuidedModel),
                drafts=isinstance(together, DraftedModel),
            ),
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            seed=seed,
            ranks=ranks,
        )

    def stats(self) -> dict[str, float]:
        """Return counters as `BaseEngine.stats` has them.

        In addition ``capture_waits``, rounds that waited for a step to be captured; 0 where none
        is.
        """
        waits = getattr(self.loop.drafter, "capture_waits", 0)
        return {**super().stats(), "capture_waits": waits}

    def _resolve(self, params: StarsParams) -> StarsParams:
        resolved = super()._resolve(params)
        if params.guided is not None:
            if params.ignore_eos and not {*self._eos_ids} <= {*(params.stop_token_ids or ())}:
                raise ValueError(
                    "ignore_eos must be False with guided, whose texts end with such a token"
                )
            self._grammars.start(params.guided)
        self._generation_defaults.report(params)
        return resolved

    @one_thread
    def prompt_scores(self, token_ids: Sequence[int], top: int = 0) -> list[TokenScore]:
        """Return the log-probabilities of a prompt's own tokens; see `prompt_scores`."""
        with self._broadcast_call("prompt_scores", list(token_ids), top):
            if self._logit_head is None:
                self._logit_head = LogitHead(self._lm.model)
            return prompt_scores(self._lm.model, self._logit_head, token_ids, top)

    @property
    def max_length(self) -> int | None:
        """The language model's context in tokens, or its guide's; None where it has no limit."""
        return self._max_length

    @classmethod
    def demo(cls, **options: Any) -> Engine:
        """Return an engine on the small review models that ship with the package.

        `options` are those of the constructor, except `model` and `reward_model`.
        """
        from stars_fast import demo

        return cls(str(demo.model_dir()), str(demo.reward_model_dir()), **options)


def _connected(config: EngineConfig) -> Ranks:
    """Return the ranks that run the engine."""
    ranks = Ranks.connect(config.device) if config.tensor_parallel else OneRank(config.device)
    if ranks.size > 1:
        for name in ("overlap_scoring", "draft_ahead", "compile_model"):
            value = getattr(config, name)
            if value:
                raise ValueError(f"{name} must be off with tensor_parallel=True, got {value}")
    return ranks


def _on_pages(
    model: PreTrainedModel, config: EngineConfig, ranks: Ranks, beside: Sequence[PreTrainedModel]
) -> PagedModel:
    """Return the language model on a pool of pages; those beside it are to have as many."""
    num_pages = config.num_pages
    if num_pages is None:
        num_pages = default_num_pages(
            model,
            page_size=config.page_size,
            max_rows=config.max_rows,
            gpu_share=LM_POOL_SHARE,
            kv_dtype=config.kv_dtype,
            beside=beside,
        )
        num_pages = ranks.smallest(num_pages)
    paged = PagedModel(
        model,
        num_pages=num_pages,
        page_size=config.page_size,
        backend=config.backend,
        attention=config.attention,
        kv_dtype=config.kv_dtype,
        compile_model=config.compile_model,
        ranks=ranks,
    )
    check_numbers(model, backend=config.backend, attention=config.attention)
    paged.pack_weights()
    if config.device_timing and paged.device.type != "cuda":
        raise ValueError(
            f"device_timing must be False for a model on {paged.device}: CUDA has the events"
        )
    return paged


def _source_of(model: str | os.PathLike[str] | PreTrainedModel, config: EngineConfig) -> str | None:
    """Return the directory or hub id whose weights the language model has, if it is one's."""
    if isinstance(model, str | os.PathLike) and config.gguf_file is None:
        return os.fspath(model)
    return None


def _scorer_for(
    reward_model: RewardModelsLike | None,
    config: EngineConfig,
    lm: PagedModel,
    lm_source: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reward_tokenizer: PreTrainedTokenizerBase | None,
    ranks: Ranks,
) -> Scorer | None:
    """Load the reward model beside the language model."""
    if reward_model is None:
        return None
    load = functools.partial(
        load_rewards,
        reward_model,
        combine=config.combine,
        combine_stds=config.combine_stds,
        lm_tokenizer=tokenizer,
        language_model=lm.model,
        language_source=lm_source if ranks.size == 1 else None,
        reward_tokenizer=reward_tokenizer,
        device=config.reward_device if config.reward_device is not None else lm.device,
        dtype=config.dtype,
        template=config.reward_template,
        head=config.reward_head,
        num_pages=config.reward_num_pages,
        page_size=config.page_size,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        quantize=config.quantize if config.reward_quantize is None else config.reward_quantize,
        max_rows=config.max_rows,
        backend=config.backend,
        attention=config.attention,
        kv_dtype=config.kv_dtype,
        compile_model=config.compile_model,
        parse_special=config.parse_special,
        timeout=config.reward_timeout,
    )
    if ranks.size == 1:
        return load()
    return load_on_ranks(
        lambda on: load(ranks=on), reward_model, ranks, device=config.reward_device
    )


def _overlaps(
    config: EngineConfig, ranks: Ranks, lm: PagedModel, scorer: Scorer | None, *, judges: bool
) -> bool:
    """Return whether a round is scored beside the next one's draft."""
    overlap = config.overlap_scoring
    if overlap is None and ranks.size > 1:
        overlap = False
    if overlap is None:
        elsewhere = frozenset() if scorer is None else scorer.devices
        overlap = bool(elsewhere) and lm.device not in elsewhere
    if overlap and judges:
        raise ValueError(
            "overlap_scoring must be False with a Persona: it judges by the model that drafts"
        )
    return overlap


def _drafts_ahead(
    config: EngineConfig, ranks: Ranks, lm: PagedModel, drafter: Drafter, *, overlap: bool
) -> bool:
    """Return whether a round's draft is launched before the step of the round before it returns."""
    ahead = config.draft_ahead
    if ahead and overlap:
        raise ValueError("draft_ahead must be False where scoring overlaps: see overlap_scoring")
    if ahead is None:
        launches = isinstance(drafter, LaunchingDrafter) and lm.device.type == "cuda"
        return launches and not overlap and ranks.size == 1
    return ahead


def _known_tokens(
    tokenizer: PreTrainedTokenizerBase | None, model: PagedModel
) -> KnownTokens | None:
    """Return the tokens that the tokenizer has, where the model's vocabulary has others, too."""
    if tokenizer is None:
        return None
    return KnownTokens.of(tokenizer.get_vocab().values(), model.vocab_size, model.device)


def _segment_ends_of(
    tokenizer: PreTrainedTokenizerBase | None, model: PagedModel
) -> Callable[[], Tensor]:
    """Return what gives, once it is asked for, what ends with each token."""

    # Not a method: an engine that its own parts hold would keep its pages until it is collected.
    @functools.cache
    def segment_ends() -> Tensor:
        assert tokenizer is not None  # checked when the request came
        return segment_end_levels(tokenizer, model.vocab_size).to(model.device)

    return segment_ends


def make_drafter(
    model: PagedModel,
    segment_ends: Callable[[], Tensor],
    ranks: Ranks = ALONE,
    known: KnownTokens | None = None,
    pace: Pace | None = None,
    max_rows: int = 0,
) -> RowDrafter:
    """Return the drafter that suits a model's backend; for the rest see `EagerDrafter`.

    Rounds end by `pace` only where that changes no result. On a GPU, the steps of rounds of up to
    `max_rows` rows are captured before it returns.
    """
    if ranks.size > 1:
        if model.on_kernels:
            _log.info("decode steps run without a CUDA graph: the model is tensor-parallel")
        return EagerDrafter(model, segment_ends, known, ranks.share)
    if not model.on_kernels:
        # Rounds end by the clock: elsewhere, results would differ from run to run by rounding.
        return EagerDrafter(model, segment_ends, known, pace=pace if model.sums_alike else None)
    from stars_fast.drafting.captured import CapturedDrafter  # Triton is for Linux only

    drafter = CapturedDrafter(model, segment_ends, known)
    drafter.capture(max_rows)
    return drafter


def _paired_drafter(
    model: DraftedModel,
    own: RowDrafter,
    tokenizer: PreTrainedTokenizerBase | None,
    ranks: Ranks,
    max_rows: int,
) -> PairedDrafter:
    """Return the drafter of two models; `own` is the language model's."""
    draft = make_drafter(
        model.draft,
        _segment_ends_of(tokenizer, model.draft),
        ranks,
        _known_tokens(tokenizer, model.draft),
        max_rows=max_rows,
    )
    return PairedDrafter(model, own, draft, _known_tokens(tokenizer, model.lm))


def _eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """Return the end-of-sequence ids that `model.generate` would stop at."""
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
