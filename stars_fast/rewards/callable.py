"""Reward models given as Python code: a function on texts, or an object with method `score`."""

from __future__ import annotations

import contextlib
import inspect
import numbers
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from stars_fast.errors import RewardError
from stars_fast.rewards.base import KnownRewards, Prompt, ScoreJob, Scorer, digest, finite_reward
from stars_fast.rewards.deadline import HungError, TimedCalls

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CallableScorer", "RewardFunction", "ScoresEach"]

RewardFunction = Callable[..., Any]


@runtime_checkable
class ScoresEach(Protocol):
    """A reward model that knows which response is to blame for an error."""

    #: Whether a reward depends on the committed text as well.
    reads_committed: bool

    async def score_each(
        self, prompts: Sequence[str], responses: Sequence[str], committed: Sequence[str]
    ) -> list[float | Exception]:
        """Return a reward for each response, or an error of that one alone.

        `committed`: what each response continues, empty where nothing was accepted yet.
        """
        ...


#: Prompt, response and committed text of a job, and the pictures of its prompt.
_Texts: TypeAlias = "tuple[str, str, str, list[Image]]"


class CallableScorer(Scorer):
    """Scores whole texts with `function(prompts, responses)`.

    The function is called once per round with the jobs of every request, and must return one
    finite number per pair: a list, a tuple, a generator, a numpy array or a tensor, the last two of
    shape (n,) or (n, 1). It may be async. It gets the prompt as the language model reads it
    (`Prompt.text`) and the response without special tokens, empty for r(x). One that has
    a parameter `images` gets the pictures of each prompt there, a list of RGB images of PIL for
    each pair. Each job is one pair of one call; equal pairs of live requests are asked for once.

    A call that raises, or that returns the wrong count, says nothing about which pair is to blame;
    the pairs are then tried again one by one, so that only the bad ones fail. A value that is not a
    number, or not finite, fails its own job alone. Whatever it raises is an error of its jobs, but
    for a KeyboardInterrupt on the main thread, which is Ctrl-C. A call that takes longer than
    `timeout` fails all its pairs; see `TimedCalls`. An exception in the place of a number is the
    error of its job.

    Parameters
    ----------
    function : callable or ScoresEach
        `f(prompts: list[str], responses: list[str]) -> list[float]`, the same with a parameter
        `images: list[list[PIL.Image.Image]]`, or an object that is asked by its `score_each`.
    timeout : float, optional
        Seconds that a call may take; None: as many as it takes.
    """

    def __init__(self, function: RewardFunction | ScoresEach, timeout: float | None = None) -> None:
        self._function = function
        self._reads_committed = isinstance(function, ScoresEach) and function.reads_committed
        self._committed: dict[int, str] = {}
        # Of the branches since the last accepted one, which may be kept.
        self._branches: dict[int, dict[int, str]] = {}
        self._timed = TimedCalls(timeout)
        self._name = getattr(function, "__qualname__", type(function).__name__)
        self._sees_images = not isinstance(function, ScoresEach) and _takes_images(function)
        self._images: dict[int, list[Image]] = {}
        self._prompts: dict[int, str] = {}
        self._known = KnownRewards()
        self._jobs = 0
        self._calls = 0

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Remember the prompt; a function has no context length to check."""
        self._prompts[request] = prompt.text
        key = _bytes(prompt.text)
        if self._sees_images and prompt.images is not None:
            self._images[request] = list(prompt.images.pictures)
            key = b"".join([*(group.key for group in prompt.images.groups), key])
        self._known.start(request, key)

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Call the function; see `Scorer.score` and the notes of the class."""
        self._jobs += len(jobs)
        if self._reads_committed:
            for job in jobs:
                self._branches.setdefault(job.request, {})[job.branch] = job.response_text
        inputs = [(job.request, digest(self._read_of(job))) for job in jobs]
        return self._known.score(inputs, lambda todo: self._score([jobs[i] for i in todo]))

    def accept(self, request: int, branch: int) -> None:
        """Remember the committed text where rewards depend on it."""
        branches = self._branches.pop(request, None)
        if branches is not None:
            self._committed[request] = branches[branch]

    def fork(self, source: int, target: int) -> None:
        """Copy the committed text where rewards depend on it."""
        self._branches.pop(target, None)
        self._committed[target] = self._committed.get(source, "")

    def _read_of(self, job: ScoreJob) -> bytes:
        """Return all that is read of a job beside the prompt."""
        response = _bytes(job.response_text)
        if not self._reads_committed:
            return response
        committed = _bytes(self._committed.get(job.request, ""))
        return b"%d %b%b" % (len(committed), committed, response)

    def _score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Score jobs of which no two are equal."""
        if not jobs:
            return []
        texts = [
            (
                self._prompts[job.request],
                job.response_text,
                self._committed.get(job.request, ""),
                self._images.get(job.request, []),
            )
            for job in jobs
        ]
        rewards = self._call(texts)
        if not isinstance(rewards, RewardError):
            return rewards
        if len(jobs) == 1 or isinstance(rewards.__cause__, HungError):
            return [rewards] * len(jobs)  # one by one they would hang one by one
        retried: list[float | Exception] = []
        for one in texts:
            found = self._call([one])
            retried.append(found if isinstance(found, RewardError) else found[0])
        return retried

    def _call(self, texts: Sequence[_Texts]) -> list[float | Exception] | RewardError:
        """Call once; the error of the whole call if it raises, miscounts or takes too long."""
        self._calls += 1
        try:
            values = self._timed.run(
                lambda: self._ask(texts),
                lambda returned: _values(returned, len(texts)),
            )
        except HungError as error:
            return self._error(str(error), error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and _gets_signals():
                raise  # it was Ctrl-C, as far as can be told
            return self._error(f"raised {type(error).__name__}: {error}", error)
        if isinstance(values, str):
            return self._error(f"returned {values}; it must return one reward per response")
        return [self._number(value) for value in values]

    def _ask(self, texts: Sequence[_Texts]) -> object:
        # Lists of its own: a function that changes them must not change the retry.
        prompts, responses, committed, images = map(list, zip(*texts, strict=True))
        if isinstance(self._function, ScoresEach):
            return self._function.score_each(prompts, responses, committed)
        if self._sees_images:
            return self._function(prompts, responses, images=images)
        return self._function(prompts, responses)

    def _error(self, what: str, cause: BaseException | None = None) -> RewardError:
        error = RewardError(f"reward function {self._name} {what}")
        error.__cause__ = cause
        return error

    def _number(self, value: object) -> float | Exception:
        if isinstance(value, Exception):
            return value
        if hasattr(value, "item"):  # a numpy scalar or a tensor of one element
            with contextlib.suppress(RuntimeError, ValueError):
                value = value.item()
        if isinstance(value, numbers.Real):
            try:
                return finite_reward(float(value))
            except OverflowError as error:
                return self._error(f"returned an integer: {error}", error)
        return self._error(f"returned {_described(value)} where a number was due")

    def finish(self, request: int) -> None:
        """Forget the request."""
        for by_request in (self._prompts, self._committed, self._branches, self._images):
            by_request.pop(request, None)
        self._known.finish(request)

    def stats(self) -> dict[str, int]:
        """Return the counters of `Scorer.stats`; tokens are not known here."""
        return {"rm_jobs": self._jobs, "rm_calls": self._calls, "rm_tokens": 0}


def _takes_images(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `images`."""
    try:
        return "images" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def _values(returned: object, count: int) -> list[Any] | str:
    """Return the rewards one by one, or what was returned in the place of `count` of them."""
    # A mapping or a set has no order, and the characters of a text are no rewards.
    if isinstance(returned, Mapping | Set | str | bytes | None):
        return _described(returned)
    if isinstance(returned, numbers.Number):
        return f"a single number ({returned!r:.80})"
    if hasattr(returned, "tolist"):  # a numpy array or a tensor
        shape = tuple(getattr(returned, "shape", ()))
        returned = returned.tolist()
        if not isinstance(returned, list):
            return f"a single number ({returned!r:.80})"
        if len(shape) == 2 and shape[1] == 1:
            returned = [row[0] for row in returned]
    if not isinstance(returned, Iterable):
        return _described(returned)
    # No more than needed: a generator may have no end.
    values = list(islice(returned, count + 1))
    if len(values) == count:
        return values
    found = len(returned) if isinstance(returned, Sized) else len(values)
    more = "" if isinstance(returned, Sized) or found < count else " or more"
    return f"{found}{more} for {count} responses"


def _described(value: object) -> str:
    if value is None:
        return "None"
    return f"a {type(value).__name__} ({value!r:.80})"


def _gets_signals() -> bool:
    """Whether a Ctrl-C would be raised on this thread."""
    return threading.current_thread() is threading.main_thread()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
