"""A language model judges its own drafts under a second prompt, the persona.

Persona-judge (arXiv 2504.12663): a draft conditioned on one preference proposes tokens, and the
same model under another preference's prompt judges them. Here what a segment is worth to the judge
is the log-probability that it gives the segment, from a cache of its own, kept like a reward
model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from stars_fast.models.logits import LogitHead
from stars_fast.models.paged import PagedModel
from stars_fast.rewards.base import Prompt, ScoreJob
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.reading import NextTokens
from stars_fast.rewards.text import conversation, marked_text
from stars_fast.rewards.tokens import Encoded, Ids, TokenPrompt, TokenSource
from stars_fast.text.tokenization import SpecialTokens, TextEncoder, escaped

__all__ = ["Persona", "PersonaScorer", "PersonaTokens"]


@dataclass(frozen=True)
class Persona:
    """What the judge reads in place of the prompt; give one of the two.

    Parameters
    ----------
    system : str, optional
        A system message put before the request's messages, through the language model's chat
        template; a system message that they begin with follows it in the same message. A prompt
        given as text or token ids becomes one user message.
    template : str, optional
        Text with ``{prompt}``: the content of the message for a prompt of one message, and for
        every other the text that the language model reads, decoded if the prompt was token ids.

    Raises
    ------
    ValueError, TypeError
        If neither or both are given, or the one that is cannot be used.
    """

    system: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if (self.system is None) == (self.template is None):
            raise ValueError("a Persona needs one of system and template, got both or none")
        name = "system" if self.template is None else "template"
        value = self.template if self.system is None else self.system
        if not isinstance(value, str):
            raise TypeError(f"{name} of a Persona must be a str, got {type(value).__name__}")
        if not value.strip():
            raise ValueError(f"{name} of a Persona must not be empty, got {value!r}")
        if name == "template" and ("{prompt}" not in value or "{response}" in value):
            raise ValueError(
                "template of a Persona must have {prompt} in it, and no {response}, which follows "
                f"the whole: got {value!r}"
            )


class PersonaTokens(TokenSource):
    """The persona's prompt as token ids, and response ids as the language model drew them.

    Parameters
    ----------
    persona : Persona
    tokenizer : transformers tokenizer
        The language model's.
    vocab_size : int
        Token ids that the language model knows; others are an error of their request or job.
    parse_special : bool
        Whether special tokens written in prompts are parsed as special.

    Raises
    ------
    ValueError
        If the persona has a system message and the tokenizer no chat template that shows it.
    """

    needs_text = False

    def __init__(
        self,
        persona: Persona,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        *,
        parse_special: bool = False,
    ) -> None:
        self._persona = persona
        self._special = SpecialTokens(tokenizer, parse=parse_special)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # A chat template writes its own special tokens, as for the language model's prompts.
        self._encoder = TextEncoder(tokenizer, add_special_tokens=persona.system is None)
        if persona.system is not None:
            if not tokenizer.chat_template:
                raise ValueError(
                    "Persona(system=...) needs a chat template, and the language model's tokenizer "
                    "has none: use Persona(template='... {prompt}')"
                )
            rendered = self._render(Prompt("a", [], None), persona.system)
            if persona.system.strip() not in rendered:
                raise ValueError(
                    "the language model's chat template does not show a system message: use "
                    "Persona(template='... {prompt}')"
                )

    def bind(self, prompt: Prompt) -> TokenPrompt:
        """Return the persona's prompt."""
        if self._persona.system is not None:
            text = self._render(prompt, self._persona.system)
        else:
            assert self._persona.template is not None
            text = escaped(self._persona.template)
            text = text.replace("{prompt}", marked_text(prompt, self._special))
        ids = np.asarray(self._encoder.encode([text])[0], np.int64)
        if not len(ids):
            raise ValueError("the persona's prompt is empty: it has no tokens after tokenisation")
        self._check(ids, "token ids of the persona's prompt")
        return TokenPrompt(ids, len(ids))

    def encode(
        self, prompts: Sequence[TokenPrompt], jobs: Sequence[ScoreJob]
    ) -> list[Encoded | Exception]:
        """Return the persona's ids and the response's of each job."""
        encoded: list[Encoded | Exception] = []
        for prompt, job in zip(prompts, jobs, strict=True):
            response = np.asarray(job.response_ids, dtype=np.int64)
            try:
                self._check(response, "response_ids")
            except ValueError as error:
                encoded.append(error)
            else:
                encoded.append(Encoded(np.concatenate((prompt.empty_ids, response))))
        return encoded

    def _render(self, prompt: Prompt, system: str) -> str:
        messages, opening = self._special.marked_in(conversation(prompt))
        if opening:  # the language model reads its prompts so, too
            messages = [*messages, {"role": "assistant", "content": opening}]
        if messages and messages[0]["role"] == "system":
            system = f"{system}\n\n{messages[0]['content']}"
            messages = messages[1:]
        messages = [{"role": "system", "content": system}, *messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"the language model's chat template refuses messages of roles {roles}: {error}; "
                "if it knows no system message, use Persona(template='... {prompt}')"
            ) from error

    def _check(self, ids: Ids, name: str) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise ValueError(
                f"{name} must lie in [0, {self._vocab_size}), the language model's vocabulary, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )


class PersonaScorer(CausalScorer):
    """The language model as judge of its own drafts.

    A job's value is log p(segment | persona's prompt, committed text) in nats, the segment being
    the response's tokens behind the committed text, under the model's raw distribution: at
    temperature 1 and without filters. r(x) is 0.0 by definition, the log-probability of
    nothing. Before anything is committed, the segment is the whole response.

    Parameters
    ----------
    model : PagedModel
        The language model on pages of the judge's own; its module may be that of another
        `PagedModel`, whose calls must not run at the same time.
    source : PersonaTokens
        How prompts and jobs become ids.
    num_pages, page_size, max_rows, max_batch_tokens
        See `CausalScorer`.

    Raises
    ------
    UnsupportedModelError
        If the model's logits cannot be computed from its hidden states.
    """

    def __init__(
        self,
        model: PagedModel,
        source: PersonaTokens,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int = 256,
        max_batch_tokens: int = 8192,
    ) -> None:
        head = LogitHead(model.model)
        super().__init__(
            model,
            NextTokens(head, head.vocab_size),
            source,
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            max_batch_tokens=max_batch_tokens,
        )
