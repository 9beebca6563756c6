"""Compares what an engine returned with what is written out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from fuzz.cases import Ask, Case, turn_of
from fuzz.runs import Run, Stream
from fuzz.written_out import WrittenOut

from stars_fast import CompletionOutput, RequestOutput, Segment

_TOLERANCE = 3e-4
_WOBBLES = 12


def differences(want: CompletionOutput, got: CompletionOutput) -> Iterator[str]:
    """How a whole response is not what it has to be."""
    for name in ("index", "token_ids", "text", "finish_reason"):
        if getattr(got, name) != getattr(want, name):
            yield f"{name} is {getattr(got, name)!r}, not {getattr(want, name)!r}"
    yield from _segment_differences(want.segments, got.segments)
    if not _alike(want.reward, got.reward):
        yield f"reward is {got.reward}, not {want.reward}"
    yield from _logprob_differences(want, got)


def unfinished_differences(want: CompletionOutput, got: CompletionOutput) -> Iterator[str]:
    """How a response on its way is not the beginning of what it has to be; its text left out."""
    yield from _segment_differences(want.segments[: len(got.segments)], got.segments)
    tokens = got.segments[-1].end if got.segments else 0
    if got.token_ids != want.token_ids[:tokens]:
        yield f"token_ids so far are {got.token_ids!r}, not {want.token_ids[:tokens]!r}"
    yield from _logprob_differences(want, got)


def _segment_differences(want: list[Segment], got: list[Segment]) -> Iterator[str]:
    if len(want) != len(got):
        yield f"there are {len(got)} segments, not {len(want)}"
    for number, pair in enumerate(zip(want, got, strict=False)):
        wrong = [
            f"{field.name} is {getattr(pair[1], field.name)}, not {getattr(pair[0], field.name)}"
            for field in fields(Segment)
            if not _alike(*(getattr(segment, field.name) for segment in pair))
        ]
        if wrong:
            yield f"segment {number}: {'; '.join(wrong)}"
            return  # what follows, follows from it


def _same_beginning(want: CompletionOutput, got: CompletionOutput, segments: int) -> bool:
    """Whether so many segments are the same, with their tokens."""
    if list(_segment_differences(want.segments[:segments], got.segments[:segments])):
        return False
    tokens = got.segments[segments - 1].end
    return want.token_ids[:tokens] == got.token_ids[:tokens]


def _alike(want: Any, got: Any) -> bool:
    """Whether the values of a field are the same, numbers up to rounding."""
    if isinstance(want, tuple):  # of attempts
        return [(a.number, a.token_ids) for a in want] == [
            (a.number, a.token_ids) for a in got
        ] and all(_close(a.reward, b.reward) for a, b in zip(want, got, strict=True))
    if isinstance(want, float) and isinstance(got, float):
        return _close(want, got)
    return bool(want == got)


def _logprob_differences(want: CompletionOutput, got: CompletionOutput) -> Iterator[str]:
    if len(got.logprobs) != len(got.token_ids):
        yield f"there are {len(got.logprobs)} logprobs for {len(got.token_ids)} tokens"
    for place, (one, other) in enumerate(zip(want.logprobs, got.logprobs, strict=False)):
        if not _close(one, other):
            yield f"the logprob of token {place} is {other}, not {one}"
            return
    if len(got.top_logprobs) != (len(got.token_ids) if want.top_logprobs else 0):
        yield f"there are {len(got.top_logprobs)} top_logprobs for {len(got.token_ids)} tokens"
    for place, (a, b) in enumerate(zip(want.top_logprobs, got.top_logprobs, strict=False)):
        # By their values: equal ones may have changed places.
        if len(a) != len(b) or not all(map(_close, a.values(), b.values())):
            yield f"the top_logprobs of token {place} are {b}, not {a}"
            return


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


class Checker:
    """Holds the runs of a case against what is written out, and counts what it has seen.

    Parameters
    ----------
    covered
        The counts, which are added to.
    """

    def __init__(self, case: Case, covered: Counter[str]) -> None:
        self._case = case
        self._covered = covered
        self._written: dict[int, WrittenOut] = {}
        self._wanted: dict[int, list[CompletionOutput]] = {}

    def problems(self, run: Run) -> Iterator[str]:
        """What is wrong with a run."""
        yield from run.problems
        for number, ask in enumerate(self._case.asks):
            stages = run.stages.get(number)
            if not stages:
                continue
            for problem in self._request_problems(number, ask, run, stages):
                yield f"request {number}: {problem}"

    def _request_problems(
        self, number: int, ask: Ask, run: Run, stages: list[RequestOutput]
    ) -> Iterator[str]:
        last = stages[-1]
        if last.error is not None:
            yield f"failed: {last.error}"
            return
        if not last.finished and number not in run.aborted:
            yield "has no end"
            return
        written = self._written_out(number, ask, last)
        if last.prompt_token_ids != written.prompt.token_ids:
            yield f"prompt_token_ids are {last.prompt_token_ids}, not {written.prompt.token_ids}"
        if last.prompt != (written.prompt.text or None):
            yield f"prompt is {last.prompt!r}, not {written.prompt.text!r}"
        if len(last.outputs) != ask.params.n:
            yield f"there are {len(last.outputs)} responses, not {ask.params.n}"
        wrong: set[int] = set()
        for stage in stages:
            for index, got in enumerate(stage.outputs):
                if index not in wrong:
                    for problem in self._response_problems(number, ask, got):
                        wrong.add(index)
                        yield f"response {index}: {problem}"
        self._covered[f"method {turn_of(ask.params)}"] += 1
        for index, got in enumerate(last.outputs):
            self._count(number, ask, got)
            stream = run.streams.get((number, index))
            if stream is not None and number not in run.aborted:
                self._covered["streams"] += stream.pieces > 1
                yield from _stream_problems(stream, got)

    def _written_out(self, number: int, ask: Ask, last: RequestOutput) -> WrittenOut:
        if number not in self._written:
            self._written[number] = WrittenOut(self._case.world, ask.prompt, ask.params)
        written = self._written[number]
        written.learn(_likely_questions(last))
        return written

    def _response_problems(self, number: int, ask: Ask, got: CompletionOutput) -> Iterator[str]:
        choosing = ask.params.method == "best_of_n" or ask.params.kind.decides == "paths"
        if got.finish_reason in (None, "abort") and choosing:
            yield from _tiling_problems(got)  # it is any of those that it would be chosen from
            return
        compare = differences
        if got.finish_reason in (None, "abort"):
            compare = unfinished_differences
            texts = self._written[number].texts
            text = texts.read(got.token_ids).text
            right = got.text == text
            if got.finish_reason is None:
                right = texts.is_so_far(got.text, got.token_ids)
            if not right:
                yield f"text so far is {got.text!r}, not {text!r}"
        if number not in self._wanted:
            self._wanted[number] = self._written[number].responses()
        found = list(compare(self._wanted[number][got.index], got))
        if not found:
            return
        if self._may_be_rounding(number, self._wanted[number][got.index], got):
            self._covered["ties"] += 1
        else:
            yield from found

    def _may_be_rounding(self, number: int, want: CompletionOutput, got: CompletionOutput) -> bool:
        """Whether the first wrong segment is right where logits and rewards are a little off.

        What follows such a segment is not looked at.
        """
        most = min(len(want.segments), len(got.segments))
        right = next((n for n in range(most) if not _same_beginning(want, got, n + 1)), most)
        if right == most:
            return False
        written = self._written[number]
        others = (written.wobbling(n).response(got.index) for n in range(1, 1 + _WOBBLES))
        return any(_same_beginning(other, got, right + 1) for other in others)

    def _count(self, number: int, ask: Ask, got: CompletionOutput) -> None:
        covered = self._covered
        covered["responses"] += 1
        covered["tokens"] += len(got.token_ids)
        covered["attempts"] += sum(segment.attempts for segment in got.segments)
        covered["fallbacks"] += sum(s.accepted == "fallback" for s in got.segments)
        covered[f"finish {got.finish_reason}"] += 1
        if ask.params.stop_texts and got.finish_reason == "stop":
            whole = self._written[number].texts.whole(got.token_ids)
            covered["stop texts"] += any(stop in whole for stop in ask.params.stop_texts)


def _likely_questions(output: RequestOutput) -> Iterator[list[int]]:
    """The responses, and what they would be with the attempts that they rejected."""
    for response in output.outputs:
        yield response.token_ids
        for segment in response.segments:
            for attempt in segment.rejected:
                if len(attempt.token_ids) > 1:
                    yield response.token_ids[: segment.start] + list(attempt.token_ids)


def _tiling_problems(got: CompletionOutput) -> Iterator[str]:
    ends = [segment.end for segment in got.segments]
    if [segment.start for segment in got.segments] != [0, *ends][: len(ends)]:
        yield f"segments do not follow each other: {got.segments}"
    if len(got.token_ids) != max(ends, default=0):
        yield f"there are {len(got.token_ids)} tokens in segments {got.segments}"


def _stream_problems(stream: Stream, got: CompletionOutput) -> Iterator[str]:
    if stream.text != got.text:
        yield f"the streamed text is {stream.text!r}, not {got.text!r}"
    if stream.token_ids != got.token_ids:
        yield f"the streamed tokens are {stream.token_ids}, not {got.token_ids}"
