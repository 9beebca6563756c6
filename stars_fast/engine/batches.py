"""Whole lists of prompts: generate, score, calibrate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from tqdm import tqdm

from stars_fast.engine.budget import after_pilot, walks_of, within_budget
from stars_fast.engine.calibrating import CalibratingEngine
from stars_fast.engine.calibration import calibration_of, plain_params, prefix_calibration_of
from stars_fast.engine.one_thread import one_thread
from stars_fast.engine.prompt_targets import SampledPrompt, gathered, prompt_targets_of
from stars_fast.errors import RewardError
from stars_fast.outputs import (
    Calibration,
    CompletionOutput,
    RequestOutput,
    SampleWalks,
    TargetKind,
)
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike, as_prompt_list
from stars_fast.seeds import derive_seed

_log = logging.getLogger(__name__)

#: Sets the draws of calibration apart from those of requests.
_CALIBRATION_SALT = 0xCA11B8A7E

#: And those of its pilot apart from its own.
_PILOT = 0xB0D6E7


class BatchEngine(CalibratingEngine):
    """An engine that takes whole lists of prompts, too."""

    @one_thread
    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: StarsParams | Sequence[StarsParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_output: Callable[[int, RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Run prompts to their end.

        Parameters
        ----------
        prompts
            One prompt or a list: text, token ids or chat messages.
        params
            Parameters of all prompts, or a list with one for each. ``target_reward="auto"`` and
            `budget` first calibrate on these prompts, unless the engine is already calibrated, or
            does so on its requests.
        use_tqdm
            Show a progress bar.
        on_output
            Called with the number of a prompt, from 0, and its output whenever that has grown, the
            finished one included. What it raises ends the call, as an interruption does.

        Returns
        -------
        list[RequestOutput]
            In the order of the prompts. A request that cannot be run has its `error` set and
            affects no other.

        Raises
        ------
        ValueError
            If `params` is a list whose length differs from that of `prompts`, or requests added by
            `add_request` are unfinished.
        """
        if self.has_unfinished():
            raise ValueError("generate: requests added by add_request are unfinished; step() first")
        texts = as_prompt_list(prompts)
        each = _params_of_each(params, len(texts))
        if self.calibration is None and not self.calibrates_on_requests:
            auto = [
                i for i, p in enumerate(each) if p.target_reward == "auto" or p.budget is not None
            ]
            if auto:
                self.calibrate(
                    [texts[i] for i in auto],
                    params=next((p for p in each if p.budget is not None), each[auto[0]]),
                    use_tqdm=use_tqdm,
                )
        done: dict[str, RequestOutput] = {}
        names = [f"generate-{i}" for i in range(len(texts))]
        places = {name: i for i, name in enumerate(names)}
        hidden = not use_tqdm or self.rank != 0
        with tqdm(total=len(texts), disable=hidden, unit="request", desc="generate") as bar:
            for name, text, one in zip(names, texts, each, strict=True):
                try:
                    self.add_request(name, text, one)
                except (ValueError, TypeError) as error:
                    done[name] = _refused(name, text, error)
                    bar.update()
            try:
                while self.has_unfinished():
                    for output in self.step():
                        if on_output is not None:
                            on_output(places[output.request_id], output)
                        if output.finished:
                            done[output.request_id] = output
                            bar.update()
            except BaseException:
                for name in names:
                    self.abort(name)
                raise
        failed = [output for output in done.values() if output.error is not None]
        if failed and self.rank == 0:
            _log.warning(
                "%d of %d requests failed, see RequestOutput.error; one of them: %s",
                *(len(failed), len(names), failed[0].error),
            )
        return [done[name] for name in names]

    @one_thread
    def score(
        self, prompts: PromptLike | Sequence[PromptLike], responses: Sequence[str]
    ) -> list[float]:
        """Return the reward of each response to its prompt.

        Raises
        ------
        ValueError
            Without a reward model, if the counts differ, or if a prompt is bad.
        RewardError
            If the reward model fails on one of them.
        """
        texts = as_prompt_list(prompts)
        if len(texts) != len(responses):
            raise ValueError(f"score: {len(texts)} prompts but {len(responses)} responses")
        pairs = [
            (self._reader.read(text, 0), self._reader.response_ids(response), response)
            for text, response in zip(texts, responses, strict=True)
        ]
        return self.score_read(pairs)

    @one_thread
    def score_read(self, pairs: Sequence[tuple[Prompt, list[int], str]]) -> list[float]:
        """Return the reward of each response to its prompt, as `score`; nothing is tokenised.

        Parameters
        ----------
        pairs
            A prompt that was read, and its response as token ids and as text.

        Raises
        ------
        ValueError, RewardError
            As `score`.
        """
        with self._broadcast_call("score_read", pairs):
            return _rewards(self.loop.score_whole(pairs))

    @one_thread
    def calibrate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        quantile: float = 0.9,
        samples_per_prompt: int = 4,
        params: StarsParams | None = None,
        *,
        use_tqdm: bool = True,
        targets: TargetKind = "pooled",
    ) -> Calibration:
        """Find a target reward: a quantile of the rewards of unaligned samples.

        Parameters
        ----------
        prompts
            Prompts like those that will be aligned.
        quantile
            In (0, 1).
        samples_per_prompt
            At least 1.
        params
            Parameters to sample with; None: the defaults. With a `budget` the samples have the
            segments of these, the prompts run once more at that cost, and requests with the same
            segments may have any budget.
        use_tqdm
            Show a progress bar.
        targets
            ``"pooled"``: all requests have one target. ``"prompt"``: a prompt that is sampled here
            has one by its own samples, pooled towards the others. ``"relative"``: each has one
            relative to the reward of its prompt alone, which takes a call of the reward model for
            each request. ``"best"``: that which predicts held-out samples best.

        Returns
        -------
        Calibration
            Also kept as `calibration`, which ``target_reward="auto"`` and None use.
        """
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"quantile must be in (0, 1), got {quantile}")
        if targets not in get_args(TargetKind):
            raise ValueError(
                f"targets must be one of {', '.join(get_args(TargetKind))}, got {targets!r}"
            )
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be at least 1, got {samples_per_prompt}")
        if self.loop.scorer is None:
            raise ValueError("calibrate needs a reward model: pass Engine(..., reward_model=...)")
        given = params or StarsParams()
        plain = plain_params(given, samples_per_prompt)
        # Its own seeds, so that calibrating does not shift those of the requests that follow.
        texts = as_prompt_list(prompts)
        each = [
            replace(plain, seed=derive_seed(self._seed ^ _CALIBRATION_SALT, i + 1))
            for i in range(len(texts))
        ]
        outputs = self.generate(texts, each, use_tqdm=use_tqdm)
        for output in outputs:
            if output.error is not None and output.error.startswith("reward"):
                raise RewardError(f"calibrate: {output.error}")
        usable = [output for output in outputs if output.error is None]
        if not usable:
            errors = "; ".join(sorted({output.error or "" for output in outputs}))
            raise ValueError(f"calibrate: no prompt could be sampled: {errors or 'none given'}")
        samples = [sample for output in usable for sample in output.outputs]
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        read = [
            self._reader.read(text, 0)
            for text, output in zip(texts, outputs, strict=True)
            if output.error is None
        ]
        own = None
        if targets != "pooled":
            own = prompt_targets_of(self._sampled(read, usable, targets), quantile, targets)
        walks = None
        if given.budget is not None:
            walks = self._walks(read, usable, given)
            walks = self._pilot(walks, texts, each, given, use_tqdm=use_tqdm)
        self.calibration = calibration_of(
            rewards, quantile, prefix_calibration_of(samples), own, walks
        )
        return self.calibration

    def _pilot(
        self,
        walks: SampleWalks,
        prompts: Sequence[PromptLike],
        each: Sequence[StarsParams],
        params: StarsParams,
        *,
        use_tqdm: bool,
    ) -> SampleWalks:
        """Run the prompts with what the walks give for the budget, and correct the walks by it."""
        found = within_budget(replace(params, n=1, trace=False), walks)
        runs = [replace(found, seed=derive_seed(one.seed or 0, _PILOT)) for one in each]
        outputs = self.generate(prompts, runs, use_tqdm=use_tqdm)
        drafted = [output.drafted_tokens for output in outputs if output.error is None]
        return after_pilot(walks, found, drafted) if drafted else walks

    def _walks(
        self, prompts: Sequence[Prompt], outputs: Sequence[RequestOutput], params: StarsParams
    ) -> SampleWalks:
        parameters = self.num_parameters(beside=bool(params.guide_weight))
        lm = sum(len(o.prompt_token_ids) + o.drafted_tokens for o in outputs) * parameters["lm"]
        rm = sum(o.rm_tokens for o in outputs) * parameters["rm"]
        return walks_of(
            [output.outputs for output in outputs],
            params,
            prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
            prompt_rewards=self._prompt_rewards(prompts) if params.alpha < 1 else None,
            scoring=rm / lm if lm else 0.0,
        )

    @one_thread
    def target_of(self, prompt: PromptLike) -> float:
        """Return what ``target_reward="auto"`` stands for with a prompt.

        Raises
        ------
        NotCalibratedError
            `calibrate` has not been called.
        ValueError, TypeError
            A prompt that cannot be read.
        RewardError
            If the reward of the prompt is asked for, and the reward model fails on it.
        """
        return self._target_of(self._reader.read(prompt, 0))

    def _sampled(
        self, prompts: Sequence[Prompt], outputs: Sequence[RequestOutput], targets: str
    ) -> list[SampledPrompt]:
        """Gather the samples of each prompt, equal prompts together."""
        read: dict[tuple[int, ...], Prompt] = {}
        sampled = []
        for prompt, output in zip(prompts, outputs, strict=True):
            found = [one.reward for one in output.outputs if one.reward is not None]
            ids = tuple(prompt.token_ids)
            read.setdefault(ids, prompt)
            if found:
                sampled.append(SampledPrompt(ids, None, found))
        sampled = gathered(sampled)
        if targets == "prompt":
            return sampled
        alone = self._prompt_rewards([read[prompt.token_ids] for prompt in sampled])
        return [
            replace(prompt, prompt_reward=reward)
            for prompt, reward in zip(sampled, alone, strict=True)
        ]

    def _prompt_rewards(self, prompts: Sequence[Prompt]) -> list[float]:
        read = cast("list[PromptLike]", list(prompts))  # which the reader gives back as they are
        return self.score(read, [""] * len(read))

    def _followed_calls(self) -> dict[str, Callable[..., Any]]:
        return {
            **super()._followed_calls(),
            "score_read": self.score_read,
        }


def _params_of_each(
    params: StarsParams | Sequence[StarsParams] | None, count: int
) -> list[StarsParams]:
    if params is None or isinstance(params, StarsParams):
        return [params or StarsParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, StarsParams) for p in params):
        raise TypeError(f"params must be StarsParams or a list of these, got {params!r:.80}")
    if len(params) != count:
        raise ValueError(
            f"params must be one for all or one per prompt ({count}), got {len(params)}"
        )
    return list(params)


def _rewards(scores: Sequence[float | Exception]) -> list[float]:
    """Return the scores; RewardError where there is none."""
    for number, score in enumerate(scores):
        if isinstance(score, Exception):
            raise RewardError(f"score: response {number}: {score}") from score
    return [float(score) for score in scores if not isinstance(score, Exception)]


def _refused(request_id: str, prompt: PromptLike, error: Exception) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    outputs = [CompletionOutput(0, finish_reason="error")]
    return RequestOutput(request_id, text, [], outputs, finished=True, error=str(error))
