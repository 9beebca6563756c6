"""A user's request: the responses it asked for, or the samples they are chosen from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stars_fast.outputs import CompletionOutput, RequestOutput
from stars_fast.params import StarsParams
from stars_fast.responses import Response
from stars_fast.rewards.base import Prompt


@dataclass
class Request:
    """A request and its responses, ``n * samples_per_response`` of them.

    Attributes
    ----------
    unchosen
        It returns some of its responses, and it is not known yet which.
    """

    request_id: str
    prompt: Prompt
    params: StarsParams
    responses: list[Response] = field(default_factory=list)
    error: str | None = None
    unchosen: bool = False

    @property
    def finished(self) -> bool:
        """Whether nothing will be added."""
        return self.error is not None or (
            not self.unchosen and all(response.finished for response in self.responses)
        )

    def to_output(self) -> RequestOutput:
        """Return a copy of the state, which later rounds do not change."""
        size = samples_per_response(self.params)
        groups = [self.responses[i : i + size] for i in range(0, len(self.responses), size)]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text or None,
            prompt_token_ids=list(self.prompt.token_ids),
            outputs=[_copy(_best(group).output, i) for i, group in enumerate(groups)],
            finished=self.finished,
            error=self.error,
            drafted_tokens=sum(response.drafted_tokens for response in self.responses),
            rm_tokens=sum(response.rm_tokens for response in self.responses),
        )


def samples_per_response(params: StarsParams) -> int:
    """Return how many whole responses or paths there are to choose from; 1 for most methods."""
    whole = params.kind.decides == "paths" or params.method == "best_of_n"
    return params.num_candidates if whole else 1


def _best(samples: Sequence[Response]) -> Response:
    """Return the chosen sample, else the best-scored one, the first of equals."""
    return max(
        samples,
        key=lambda r: (r.chosen, -math.inf if r.output.reward is None else r.output.reward),
    )


def _copy(output: CompletionOutput, index: int) -> CompletionOutput:
    return replace(
        output,
        index=index,
        token_ids=list(output.token_ids),
        logprobs=list(output.logprobs),
        segments=list(output.segments),
    )
