"""Metrics for Prometheus, under the names that people know from vLLM, with ``stars:`` before them.

Counts of tokens and segments are the engine's own since the server was made, and so hold aborted
requests, too; times and distributions are taken from what the requests return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stars_fast.outputs import Segment
from stars_fast.server.engines import ServedEngine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_ATTEMPTS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 64)
_REWARDS = (-16, -8, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 8, 16)

#: Weight of the newest request in the mean duration.
_NEWEST = 0.1
_LONGEST_RETRY = 60


class Metrics:
    """The metrics of one server.

    Parameters
    ----------
    engine
        Whose counters they show.

    Attributes
    ----------
    connections
        Returns how many connections are open, idle ones included.
    """

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine
        self.connections: Callable[[], int] = lambda: 0
        self._mean_seconds = 0.0
        registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self._registry = registry
        Gauge(
            "stars:http_connections", "Open connections, idle ones included.", registry=registry
        ).set_function(lambda: self.connections())  # noqa: PLW0108 - it is set later
        self._first_token = Histogram(
            "stars:time_to_first_token_seconds",
            "From a request's arrival to its first accepted segment.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._latency = Histogram(
            "stars:e2e_request_latency_seconds",
            "From a request's arrival to the end of its response, requests that succeeded.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._responses = Counter(
            "stars:http_requests",
            "Requests to the two completions endpoints by status; 499: the client has left.",
            ("status",),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "stars:prompt_tokens", "Tokens of prompts that were taken.", registry=registry
        )
        self._attempts = Histogram(
            "stars:segment_attempts",
            "Attempts that a committed segment took.",
            buckets=_ATTEMPTS,
            registry=registry,
        )
        self._rewards = Histogram(
            "stars:segment_reward",
            "Reward of committed segments, where they have one.",
            buckets=_REWARDS,
            registry=registry,
        )

    def first_token(self, seconds: float) -> None:
        """Count a request's first segment."""
        self._first_token.observe(seconds)

    def segments(self, segments: Sequence[Segment]) -> None:
        """Count committed segments."""
        for segment in segments:
            self._attempts.observe(segment.attempts)
            if segment.reward is not None:
                self._rewards.observe(segment.reward)

    def ended(self, status: int, seconds: float, prompt_tokens: int) -> None:
        """Count a request that has ended."""
        self._prompt_tokens.inc(prompt_tokens)
        self._responses.labels(str(status)).inc()
        if status == 200:
            self._latency.observe(seconds)
            mean = self._mean_seconds or seconds
            self._mean_seconds = (1 - _NEWEST) * mean + _NEWEST * seconds

    def retry_after(self) -> int:
        """Return the seconds after which a full queue should have room for one more request."""
        between = self._mean_seconds / max(1, self._engine.num_running)
        return min(max(1, math.ceil(between)), _LONGEST_RETRY)

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Shows an engine's counters as they are when asked."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine
        self._before = engine.stats()  # calibration is no request's

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        since = {name: value - self._before.get(name, 0) for name, value in stats.items()}
        pages = stats["pages_used"] + stats["pages_free"]
        gauges = {
            "num_requests_running": ("Requests in the engine.", self._engine.num_running),
            "num_requests_waiting": ("Requests in the queue.", self._engine.num_waiting),
            "kv_cache_usage_perc": (
                "Part of the language model's KV pages in use; 1 is all of them.",
                stats["pages_used"] / pages if pages else 0.0,
            ),
        }
        if "calibration_samples" in stats:
            gauges["calibration_samples"] = (
                "Unaligned samples of requests' prompts that the target is found from.",
                stats["calibration_samples"],
            )
        if "calibration_target" in stats:
            gauges["calibration_target"] = (
                "Quantile of their rewards: the target of requests at present.",
                stats["calibration_target"],
            )
        counters = {
            "generation_tokens": ("Accepted tokens.", since["accepted_tokens"]),
            "tokens_discarded": (
                "Tokens drawn and not accepted.",
                since["drafted_tokens"] - since["accepted_tokens"],
            ),
            "rm_tokens": (
                "Tokens run through the reward model; 0 if it is a function.",
                since.get("rm_tokens", 0),
            ),
            "segments_proposed": ("Candidate segments looked at.", since["attempts"]),
            "segments_accepted": (
                "Segments that passed, or needed no test.",
                since["segments"] - since["fallbacks"],
            ),
            "fallbacks": (
                "Segments kept as the best of attempts that all failed.",
                since["fallbacks"],
            ),
            "num_preemptions": ("Requests set back for want of pages.", since["preemptions"]),
            "capture_waits": (
                "Rounds that waited for a CUDA graph to be captured; 0 on a CPU.",
                since.get("capture_waits", 0),
            ),
        }
        if "calibration_tokens" in stats:
            counters["calibration_tokens"] = (
                "Tokens of unaligned samples, which other counters hold, too.",
                since["calibration_tokens"],
            )
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"stars:{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"stars:{name}", text, value)
