"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from idlm_kernels.generate.engine import Engine
from idlm_kernels.generate.output import GenerationResult

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        self._texts = Counter("idlm_texts", "Texts that ended, by how", ["finish_reason"], registry=registry)
        self._refused = Counter("idlm_refused", "HTTP errors, by status", ["status"], registry=registry)
        self._prompt_tokens = Counter("idlm_prompt_tokens", "Prompt tokens of the texts", registry=registry)
        self._tokens = Counter("idlm_generated_tokens", "Tokens of the texts", registry=registry)
        self._forwards = Counter(
            "idlm_forwards", "Forwards that committed the tokens; tokens / forwards is TPF", registry=registry
        )
        self._seconds = Histogram(
            "idlm_text_seconds", "From the request to the end of a text", buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "idlm_first_token_seconds", "From the request to its first tokens", buckets=_SECONDS, registry=registry
        )
        gauges = {
            "idlm_running": ("Requests that are decoded", lambda: engine.num_running),
            "idlm_waiting": ("Requests that wait for the batch", lambda: engine.num_waiting),
            "idlm_free_pages": ("Pages of the KV cache that no request holds", lambda: engine.pool.free_pages),
            "idlm_pages": ("Pages of the KV cache", lambda: engine.pool.num_pages),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def finished(self, result: GenerationResult, seconds: float) -> None:
        self._texts.labels(result.finish_reason).inc()
        self._prompt_tokens.inc(result.prompt_tokens)
        self._tokens.inc(result.tokens)
        self._forwards.inc(result.forwards)
        self._seconds.observe(seconds)

    def failed(self) -> None:
        self._texts.labels("error").inc()

    def cancelled(self, texts: int) -> None:
        self._texts.labels("cancelled").inc(texts)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
