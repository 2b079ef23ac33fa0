"""What one server counts, in Prometheus' text format; imports no torch."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_klong.serve.interface import Engine
from megatron_klong.serve.protocol import Completion

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_GAUGES = {
    "running": "Requests that are sampled",
    "waiting": "Requests that wait for a place",
    "blocks_used": "Blocks of the cache that requests hold",
    "blocks": "Blocks of the cache",
    "prefill_computed": "Tokens of prompts that were read, since the start",
    "prefill_reused": "Tokens of prompts that were found read, since the start",
    "evictions": "Requests that lost their place in the cache, since the start",
}


class Metrics:
    """`finished` and `answered` count; `text` is what a scrape gets."""

    def __init__(self) -> None:
        # of its own: several servers in one process, as in tests, must not share counters
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "klong_answers", "Answers, by route and HTTP status", ["route", "status"], registry=self._registry
        )
        self._ends = Counter("klong_replies", "Replies, by what ended them", ["reason"], registry=self._registry)
        self._prompt = Counter("klong_prompt_tokens", "Tokens of prompts replied to", registry=self._registry)
        self._generated = Counter("klong_generated_tokens", "Tokens sampled in replies", registry=self._registry)
        self._seconds = Histogram(
            "klong_reply_seconds", "From request to whole reply", buckets=_SECONDS, registry=self._registry
        )
        self._in_flight = Gauge("klong_in_flight", "Replies that are waited for", registry=self._registry)
        self._policy = Gauge("klong_policy_epoch", "The policy that is served", registry=self._registry)
        self._loads = {
            name: Gauge(f"klong_engine_{name}", text, ["replica"], registry=self._registry)
            for name, text in _GAUGES.items()
        }

    def answered(self, route: str, status: int) -> None:
        self._answers.labels(route, str(status)).inc()

    def finished(self, completions: Sequence[Completion], seconds: float) -> None:
        for completion in completions:
            self._ends.labels(completion.finish_reason).inc()
            self._prompt.inc(len(completion.prompt_token_ids))
            self._generated.inc(len(completion.generation_token_ids))
        self._seconds.observe(seconds)

    def text(self, engine: Engine, in_flight: int) -> bytes:
        self._in_flight.set(in_flight)
        self._policy.set(engine.policy_epoch)
        for replica, load in enumerate(engine.loads):
            for name, gauge in self._loads.items():
                gauge.labels(str(replica)).set(getattr(load, name))
        return generate_latest(self._registry)
