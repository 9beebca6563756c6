"""An engine whose target can follow its requests."""

from __future__ import annotations

from dataclasses import replace

from stars_fast.engine.base import BaseEngine
from stars_fast.engine.one_thread import one_thread
from stars_fast.engine.requests import Request
from stars_fast.engine.streaming import PlainSamples, StreamingCalibration
from stars_fast.errors import RewardError
from stars_fast.outputs import Calibration, RequestOutput, TargetKind
from stars_fast.params import StarsParams


class CalibratingEngine(BaseEngine):
    """Draws plain samples of its requests' prompts beside them, once it is asked to."""

    _streaming: StreamingCalibration | None = None

    @one_thread
    def calibrate_on_requests(
        self, quantile: float = 0.9, share: float = 0.05, *, targets: TargetKind = "pooled"
    ) -> None:
        """Have ``target_reward="auto"`` and None follow the requests, as `engine.streaming` says.

        That is until `calibration` is set, or `calibrate` called, without which there is no
        `calibrate_prefixes` and no `budget`.

        Parameters
        ----------
        quantile, targets
            As of `BatchEngine.calibrate`.
        share
            In (0, 1]: the part of these requests whose prompts are sampled, and of the tokens that
            they and the samples draw the part that is the samples' in the long run at most. The
            first 8 prompts are sampled whatever it takes, and their requests wait for that.

        Raises
        ------
        ValueError
            For values out of range, without a reward model, with several ranks, or if requests are
            unfinished.
        """
        streaming = StreamingCalibration(quantile, share, targets, self._seed)
        if self.loop.scorer is None:
            raise ValueError(
                "calibrate_on_requests needs a reward model: pass Engine(..., reward_model=...)"
            )
        if self._ranks.size > 1:
            raise ValueError(
                "calibrate_on_requests needs an engine of one process: tensor_parallel must be "
                f"off, got {self._ranks.size} ranks"
            )
        if self.has_unfinished():
            raise ValueError("calibrate_on_requests: requests are unfinished; step() first")
        self._set_calibration(None)
        self._streaming = streaming

    @property
    def calibrates_on_requests(self) -> bool:
        """Whether the target follows the requests."""
        return self._streaming is not None

    @property
    def samples_prompts(self) -> bool:
        """Whether samples of requests' prompts are being drawn, which `step` does as well."""
        return self._streaming is not None and bool(self._streaming.open)

    @one_thread
    def drop_samples(self) -> None:
        """Give up the samples of requests' prompts that are being drawn."""
        if self._streaming is None:
            return
        for samples in self._streaming.open:
            samples.fail("they were dropped")
        for request in [one for one in self._requests.values() if one.samples is not None]:
            self._drop(request)
        self._streaming.open.clear()

    @one_thread
    def step(self) -> list[RequestOutput]:
        """Run one round; see `BaseEngine.step`."""
        outputs = super().step()
        if self._streaming is None:
            return outputs
        return outputs + self._after_round(self._streaming)

    @one_thread
    def reset_prefix_cache(self) -> None:
        """Forget the cached pages of finished prompts; see `BaseEngine.reset_prefix_cache`."""
        if not self.has_unfinished():
            self.drop_samples()
        super().reset_prefix_cache()

    def has_unfinished(self) -> bool:
        """Whether any request is queued or running; samples of their prompts do not count."""
        return len(self._requests) > (0 if self._streaming is None else self._streaming.num_running)

    def stats(self) -> dict[str, float]:
        """Return counters as `BaseEngine.stats` has them.

        With `calibrate_on_requests` also ``calibration_samples`` that count at present,
        ``calibration_tokens`` drawn for all there were, which other counters hold too, and
        ``calibration_target``, the quantile of the samples, once there are any.
        """
        stats = super().stats()
        if self._streaming is not None:
            stats |= self._streaming.stats()
            if self.calibration is not None:
                stats["calibration_target"] = self.calibration.target_reward
        return stats

    def _set_calibration(self, value: Calibration | None) -> None:
        if self._streaming is not None and self._streaming.holds:
            raise ValueError("calibration: requests wait for their target; step() or abort() first")
        self.drop_samples()
        self._streaming = None
        super()._set_calibration(value)

    def _resolve(self, params: StarsParams) -> StarsParams:
        follows = self._streaming is not None and params.budget is None
        if follows and params.needs_calibration:
            self._limits.check(params)
            return params  # its target is known when it begins
        return super()._resolve(params)

    def _waits_for_target(self, request: Request) -> bool:
        if self._streaming is None:
            return False
        self._prefixes(request.params)  # refused now, and not when it begins
        samples = self._streaming.arrive(request)
        if samples is None:
            return False
        if samples.prompt is request.prompt:
            try:
                self._draw_samples(self._streaming, samples)
            except BaseException:
                samples.fail("they do not fit")
                self._streaming.leave(request)
                raise
        params = request.params
        request.params = replace(params, seed=self._seed_of(params))  # in the order of arrival
        request.groups, request.unchosen = [[] for _ in range(params.n)], True
        self._requests[request.request_id] = request
        return True

    def _ended(self, request: Request) -> None:
        if self._streaming is not None:
            self._streaming.leave(request)

    def _after_round(self, streaming: StreamingCalibration) -> list[RequestOutput]:
        """Take in samples, begin requests that waited and start further samples.

        Returns the requests that could not begin.
        """
        found = streaming.learn(self._prompt_rewards)
        if found is not None:
            self._calibration = found
        failed = []
        for request, why in streaming.released():
            try:
                self._begin(request, why)
            except Exception as error:  # noqa: BLE001 - it is this request's
                request.error = str(error)
                self._drop(request)
                failed.append(request.to_output())
        for samples in streaming.open:
            try:
                self._draw_samples(streaming, samples)
            except Exception as error:  # noqa: BLE001 - the samples are lost, and nothing else
                samples.fail(str(error))
        return failed

    def _begin(self, request: Request, why: str | None) -> None:
        if why is not None:
            raise RewardError(f"there is no target, as no prompt could be sampled: {why}")
        target = self._target_of(request.prompt)
        request.params = replace(request.params, target_reward=target)
        self._queue(request)

    def _draw_samples(self, streaming: StreamingCalibration, samples: PlainSamples) -> None:
        """Start the samples of a prompt that may start now.

        All at once if a request waits for them; else those that find rows free, and one in any
        case, so that of all rows no more than one is taken from requests.
        """
        while samples.due and (
            samples.awaited or not streaming.num_running or len(self._owners) < self.max_rows
        ):
            request = streaming.next_sample(samples)
            try:
                self._check_unused(request.request_id)
                self._queue(request)
            except BaseException:
                streaming.leave(request)
                raise
