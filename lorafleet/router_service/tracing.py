"""Traces of calls by OpenTelemetry, for whoever asks for them: nothing else imports this file, or its libraries.

A caller's W3C trace context is taken up, so that the call is a part of the caller's trace. A call's parts are its
children: ``authenticate``, ``quota``, ``route``, and for each generation the engine's ``queue``, ``prefill`` and
``decode``. Attributes have the names of OpenTelemetry's semantic conventions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lorafleet import __version__
from lorafleet.router_service.trail import Attributes, Span
from lorafleet.router_service.waiting import WouldWait

_EXPORT_S: Final = 5.0
"""For one export; a collector that does not answer costs spans, and never a call."""
_W3C: Final = TraceContextTextMapPropagator()


class Tracing:
    """Begins a span for each call and hands finished ones to ``processor``."""

    def __init__(self, processor: SpanProcessor, *, service_name: str = "lorafleet") -> None:
        resource = Resource.create({"service.name": service_name, "service.version": __version__})
        # Of our own, not the process' global one: whoever embeds a server keeps that.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("lorafleet", __version__)

    @classmethod
    def over_http(cls, url: str, *, service_name: str = "lorafleet") -> Tracing:
        """Sends spans to a collector in the background: OTLP over HTTP, to ``url`` as it stands."""
        exporter = OTLPSpanExporter(endpoint=url, timeout=_EXPORT_S)
        return cls(BatchSpanProcessor(exporter), service_name=service_name)

    def begin(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
        """A call's span, in the trace that its headers name."""
        # An empty context first: a span that happens to be current here is not this call's.
        parent = _W3C.extract(headers, context=Context())
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER, attributes=dict(attributes))
        return _CallSpan(self._tracer, span)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


class _CallSpan:
    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span
        self._children = trace.set_span_in_context(span, Context())

    @property
    def trace_id(self) -> str:
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        child = self._tracer.start_span(name, context=self._children)
        again = False
        try:
            yield
        except WouldWait:
            again = True  # on a thread: this one is never ended, and so never told
            raise
        except Exception as error:
            # Its type, not its words: they may quote what the call brought.
            child.set_attribute("error.type", type(error).__name__)
            child.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            if not again:
                child.end()

    def interval(self, name: str, began: float, ended: float, attributes: Attributes) -> None:
        epoch_ns = time.time_ns() - time.monotonic_ns()
        child = self._tracer.start_span(
            name, context=self._children, start_time=epoch_ns + int(began * 1e9), attributes=dict(attributes)
        )
        child.end(end_time=epoch_ns + int(ended * 1e9))

    def end(self, attributes: Attributes, *, failed: bool) -> None:
        self._span.set_attributes(dict(attributes))
        if failed:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
