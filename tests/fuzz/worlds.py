"""The random models and tokenizers that a case runs on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from fuzz.rewards import RewardSetup, TemplateKind, function_reward
from fuzz.tokenizers import CHATS, FAMILIES, tokenizer, wrapped
from helpers.tiny_architectures import tiny_lm
from helpers.tiny_rewards import CAUSAL_CONFIGS, ENCODER_CONFIGS, reward_model
from helpers.tiny_tokenizers import encoder_tokenizer
from tokenizers import Tokenizer

from stars_fast import Calibration, Engine
from stars_fast.outputs import PrefixCalibration
from stars_fast.rewards import Persona

#: Of the language model, in tokens. Reward models read more: templates, and smaller pieces.
CONTEXT = 400
REWARD_CONTEXT = 640

# No mixtures of experts: which expert a token is sent to is no continuous function of it.
ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3",
    "glm4", "opt", "gpt2", "gpt_neox", "cohere2", "starcoder2",
)  # fmt: skip
_REWARD_FAMILIES = (*CAUSAL_CONFIGS, *ENCODER_CONFIGS)
_FORMATS = ("Q: {prompt}\nA: {response}\n##", "{prompt} {response}")
_PERSONAS = ("Be kind. {prompt}", "Say: {prompt}!", "Judge: {prompt}\n")

CALIBRATION = Calibration(
    target_reward=0.5,
    quantiles={},
    rewards=(),
    prefixes=PrefixCalibration(
        positions=(3, 10, 30),
        slope=(0.5, 1.0, 0.8),
        intercept=(0.1, -0.2, 0.3),
        correlation=(0.1, 0.1, 0.1),
        samples=(9, 9, 9),
    ),
)


@dataclass(frozen=True)
class World:
    """A language model, its tokenizer, and a reward model.

    Attributes
    ----------
    chat
        Name of the tokenizer's chat template.
    wider
        Logits of the model beyond the tokenizer's vocabulary.
    eos_ids
        End the response, unless they are ignored.
    beside
        Models that run beside, by the option that names each.
    """

    family: str
    tokenizer: Any
    chat: str | None
    architecture: str
    model: Any
    wider: int
    eos_ids: tuple[int, ...]
    rewards: RewardSetup
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def guides(self) -> bool:
        """Whether there is a guide."""
        return "guide" in self.beside

    @property
    def drafts(self) -> bool:
        """Whether there is a draft model."""
        return "draft_model" in self.beside

    @property
    def vocab_size(self) -> int:
        """The model's vocabulary."""
        return len(self.tokenizer) + self.wider

    def engine(self, seed: int, options: dict[str, Any]) -> Engine:
        """An engine on these models."""
        engine = Engine(
            self.model,
            self.rewards.model,
            tokenizer=self.tokenizer,
            device="cpu",
            seed=seed,
            **self.rewards.engine_options,
            **self.beside,
            **options,
        )
        engine.calibration = CALIBRATION
        return engine

    def __str__(self) -> str:
        return (
            f"{self.architecture} on {self.family} tokens (chat {self.chat}, {self.wider} logits "
            f"more than tokens), rewards by {self.rewards.label}, template "
            f"{self.rewards.template!r}, beside {sorted(self.beside)}"
        )


def bracketed(prompt: str, response: str) -> str:
    """A template that the engine knows nothing of."""
    return f"<<{prompt}>> {response} [end]"


def draw_world(rng: random.Random, *, family: str, judged: bool) -> World:
    """Draw all but the family of tokenizers; `judged`: the model judges itself."""
    size = rng.choice([380, 430, 500])
    chat = rng.choice([None, *CHATS])
    tokens = tokenizer(
        family,
        size,
        chat=chat,
        adds_bos=rng.random() < 0.6,
        pad=rng.choice(["<pad>", "</s>", None]),
        cleans_up=family == "word_piece" and rng.random() < 0.5,  # others may not
    )
    wider = rng.choice([0, 0, 0, 0, 5, 64])
    eos_ids = [tokens.eos_token_id]
    if rng.random() < 0.4:  # or no response would ever come to one
        eos_ids += rng.sample(range(20, len(tokens)), 8)
    architecture = rng.choice(ARCHITECTURES)
    model = tiny_lm(
        architecture,
        seed=rng.randrange(2**31),
        vocab_size=len(tokens) + wider,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        tie_word_embeddings=False,  # or tokens repeat themselves
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    if judged:
        rewards = RewardSetup("persona", Persona(template=rng.choice(_PERSONAS)))
    elif rng.random() < (0.8 if wider else 0.2):
        rewards = RewardSetup("function", function_reward)
    else:
        rewards = _draw_reward_model(rng, family, tokens)
    return World(family, tokens, chat, architecture, model, wider, tuple(eos_ids), rewards)


def draw_beside(rng: random.Random, world: World, *, drafts: bool) -> World:
    """Draw whether another model guides, or drafts, and that one's reference."""
    kinds = ["draft"] if drafts else [None, None, "guide", "draft"]
    kind = rng.choice(kinds)
    if kind is None:
        return world
    first, second = {
        "guide": ("guide", "guide_reference"),
        "draft": ("draft_model", "draft_reference"),
    }[kind]
    beside: dict[str, Any] = {first: _draw_small(rng, world)}
    if rng.random() < 0.5:
        beside[second] = _draw_small(rng, world)
    elif kind == "guide" and rng.random() < 0.5:
        beside[second] = "uniform"
    return replace(world, beside=beside)


def _draw_small(rng: random.Random, world: World) -> Any:
    return tiny_lm(
        rng.choice(["llama", "gpt2", "qwen2"]),
        seed=rng.randrange(2**31),
        vocab_size=len(world.tokenizer) + rng.choice([0, 0, 9]),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )


def _draw_reward_model(rng: random.Random, family: str, language: Any) -> RewardSetup:
    name = rng.choice(_REWARD_FAMILIES)
    encoder = name in ENCODER_CONFIGS
    same = rng.random() < 0.5
    if same:
        tokens = _draw_same_tokenizer(rng, language)
    else:
        tokens = _draw_other_tokenizer(rng, family, encoder=encoder)
    kinds: list[TemplateKind | None] = [None, None, None, "plain", "format", "callable"]
    if tokens.chat_template:
        kinds += ["chat", "chat"]
    if encoder:
        kinds.append("pair")
    kind = rng.choice(kinds)
    template: Any = kind
    if kind == "format":
        template = rng.choice(_FORMATS)
    elif kind == "callable":
        template = bracketed
    shared = same and not encoder and kind != "callable"
    return RewardSetup(
        name,
        reward_model(
            name, tokens, seed=rng.randrange(2**31), max_position_embeddings=REWARD_CONTEXT
        ),
        tokens,
        template,
        kind or ("chat" if tokens.chat_template else "pair" if encoder else "plain"),
        encoder,
        shared,
    )


def _draw_same_tokenizer(rng: random.Random, language: Any) -> Any:
    """One with the tokens of the language model's, or that very one."""
    if language.pad_token is not None and rng.random() < 0.4:
        return language
    return wrapped(
        Tokenizer.from_str(language.backend_tokenizer.to_str()),
        chat=rng.choice([None, *CHATS]),
        pad=rng.choice(["<pad>", "</s>"]),
        cleans_up=language.clean_up_tokenization_spaces,
    )


def _draw_other_tokenizer(rng: random.Random, family: str, *, encoder: bool) -> Any:
    if encoder and rng.random() < 0.5:
        return encoder_tokenizer(model_max_length=REWARD_CONTEXT)
    return tokenizer(
        rng.choice([other for other in FAMILIES if other not in (family, "word_level")]),
        rng.choice([395, 495]),
        chat=rng.choice([None, *CHATS]),
        adds_bos=rng.random() < 0.6,
        adds_eos=rng.random() < 0.3,
        pad=rng.choice(["<pad>", "</s>"]),
        pairs=encoder,
    )
