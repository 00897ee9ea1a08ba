"""A typed client of the router service, for applications. Needs grpcio with grpcio-status, nothing else of the server.

::

    with RouterClient("127.0.0.1:50051", key="lf_…") as client:
        print(client.generate("SELECT ", model="auto", max_tokens=32).text)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

from lorafleet.connection import ClientTls as ClientTls
from lorafleet.connection import Connection
from lorafleet.errors import InvalidInputError, UnavailableError
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc

FinishReason = Literal["stop", "length", "cancelled"]


class SamplingOptions(TypedDict, total=False):
    """How tokens are picked; what is left out, or None, has the engine's default.

    In this order: penalties, ``logit_bias``, ``min_tokens``, ``temperature``, ``top_k``, ``top_p``, ``min_p``.
    """

    max_tokens: int | None
    """0 only scores the prompt, and needs ``prompt_logprobs``."""
    temperature: float | None
    """0 is greedy."""
    top_p: float | None
    """Keeps the likeliest tokens whose probabilities add up to this."""
    top_k: int | None
    """Keeps the k likeliest tokens; 0 keeps all."""
    min_p: float | None
    """Keeps the tokens at least this likely, as a share of the likeliest one."""
    repetition_penalty: float | None
    """Divides the logits of tokens in the prompt or generated; multiplies negative ones."""
    presence_penalty: float | None
    """Taken from the logits of generated tokens."""
    frequency_penalty: float | None
    """Taken from the logits of generated tokens once for each time."""
    logit_bias: Mapping[int, float] | None
    """Token id → what is added to its logit."""
    seed: int | None
    """Makes sampling reproducible."""
    stop: Sequence[str]
    """The generation ends before the first of these texts."""
    stop_token_ids: Sequence[int]
    """The generation ends before the text of the first of these tokens."""
    ignore_eos: bool
    min_tokens: int | None
    """The first so many tokens end the generation neither by end of text nor by a stop token or text."""
    logprobs: bool
    """Of the generated tokens, under the model's own distribution: before all of the above."""
    top_logprobs: int | None
    """With ``logprobs``: those of so many of the most likely tokens, at most 20."""


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    logprob: float
    """Nats."""


TopLogprobs = tuple[TokenLogprob, ...]
"""The most likely tokens in the place of a generated one, the likeliest first."""


@dataclass(frozen=True)
class MixComponent:
    reference: str
    """``TENANT/ADAPTER:VERSION``"""
    digest: str
    weight: float


@dataclass(frozen=True)
class RouteCandidate:
    reference: str
    """``TENANT/ADAPTER:VERSION``, or ``base``."""
    digest: str
    """Empty for the base."""
    score: float
    """What the router ranks by; higher is better. The likelihood router's is nats per token of the text."""
    probability: float
    weight: float


@dataclass(frozen=True)
class RouteDecision:
    router: str
    mix: tuple[MixComponent, ...]
    candidates: tuple[RouteCandidate, ...]
    """Best first."""
    reason: str


@dataclass(frozen=True)
class Chunk:
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, one for each token; empty unless asked for."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """One for each token; empty unless asked for."""


@dataclass(frozen=True)
class GenerateResult:
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, one for each token; empty unless asked for."""
    finish_reason: FinishReason
    prompt_tokens: int
    mix: tuple[MixComponent, ...]
    """What answered; empty for the bare base."""
    route: RouteDecision | None
    """Where the router decided."""
    prompt_logprobs: tuple[float, ...]
    """Nats, for the prompt's tokens from the second on; empty unless asked for."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """One for each token; empty unless asked for."""


@dataclass(frozen=True)
class AdapterInfo:
    reference: str
    digest: str
    version: int
    rank: int
    federation: str
    """Empty for an adapter that was imported."""
    round: int


class TokenStream:
    """An answer as it comes: iterate for its chunks, then read ``result``. Leaving the block cancels what is left."""

    def __init__(self, call: Any, connection: Connection) -> None:
        self._call, self._connection = call, connection
        self._chunks: list[Chunk] = []
        self._result: GenerateResult | None = None

    def __iter__(self) -> Iterator[Chunk]:
        with self._connection.translated():
            for message in self._call:
                if message.HasField("summary"):
                    self._result = _result(self._chunks, message.summary)
                else:
                    self._chunks.append(_chunk(message))
                    yield self._chunks[-1]

    @property
    def result(self) -> GenerateResult:
        """The whole answer; raises UnavailableError while chunks are still to come."""
        if self._result is None:
            raise UnavailableError("the answer has not come to its end; iterate over the stream first")
        return self._result

    def cancel(self) -> None:
        """Ends the generation on the server, too."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class RouterClient:
    """Calls one router service with one API key; errors are those of :mod:`lorafleet.errors`, in the server's words.

    ``timeout_s`` bounds each call as a whole; a call that takes longer is cancelled on the server, too, and raises
    DeadlineExceededError. Without ``tls`` the key travels in the clear: right on loopback only. Thread-safe.
    """

    def __init__(self, address: str, *, key: str, timeout_s: float = 120.0, tls: ClientTls | None = None) -> None:
        self._connection = Connection(address, key=key, timeout_s=timeout_s, tls=tls)
        self._stub = router_pb2_grpc.RouterServiceStub(self._connection.channel)  # type: ignore[no-untyped-call]

    def route(self, text: str) -> RouteDecision:
        """Which adapters would answer a text, and why."""
        response = self._connection.call(self._stub.Route, router_pb2.RouteRequest(text=text))
        return _decision(response.decision)

    def list_adapters(self) -> list[AdapterInfo]:
        """The live version of each adapter that the key's tenant may use."""
        response = self._connection.call(self._stub.ListAdapters, router_pb2.ListAdaptersRequest())
        return [AdapterInfo(a.reference, a.digest, a.version, a.rank, a.federation, a.round) for a in response.adapters]

    def generate(
        self,
        prompt: str,
        *,
        model: str = "",
        mix: Mapping[str, float] | None = None,
        prompt_logprobs: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerateResult:
        """Generates a continuation and waits for its end; the arguments are those of :meth:`stream`."""
        with self.stream(prompt, model=model, mix=mix, prompt_logprobs=prompt_logprobs, **sampling) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(
        self,
        prompt: str,
        *,
        model: str = "",
        mix: Mapping[str, float] | None = None,
        prompt_logprobs: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> TokenStream:
        """Generates a continuation, chunk by chunk.

        ``model``: "" or "base" for the bare base, "auto" for the router's choice, or a reference
        ``TENANT/ADAPTER[@ALIAS|:VERSION]``; ``mix``: reference → weight, instead of a model; ``sampling``: see
        :class:`SamplingOptions`.
        """
        try:
            request = router_pb2.GenerateRequest(
                prompt=prompt,
                model=model,
                mix=mix,
                sampling=router_pb2.Sampling(**sampling),
                prompt_logprobs=prompt_logprobs,
            )
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"the request cannot be sent as it is: {error}") from None
        return TokenStream(self._connection.begin(self._stub.Generate, request), self._connection)

    def close(self) -> None:
        """Closes the connection; calls that run are cancelled."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _mix(components: Sequence[router_pb2.MixComponent]) -> tuple[MixComponent, ...]:
    return tuple(MixComponent(c.reference, c.digest, c.weight) for c in components)


def _decision(message: router_pb2.RouteDecision) -> RouteDecision:
    candidates = tuple(
        RouteCandidate(c.reference, c.digest, c.score, c.probability, c.weight) for c in message.candidates
    )
    return RouteDecision(message.router, _mix(message.mix), candidates, message.reason)


_FINISH_REASONS: Mapping[int, FinishReason] = {
    router_pb2.FINISH_REASON_STOP: "stop",
    router_pb2.FINISH_REASON_LENGTH: "length",
    router_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


def _chunk(message: router_pb2.GenerateResponse) -> Chunk:
    top = (tuple(TokenLogprob(one.token_id, one.logprob) for one in place.tokens) for place in message.top_logprobs)
    return Chunk(message.text, tuple(message.token_ids), tuple(message.logprobs), tuple(top))


def _result(chunks: Sequence[Chunk], summary: router_pb2.GenerateSummary) -> GenerateResult:
    return GenerateResult(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(value for chunk in chunks for value in chunk.logprobs),
        finish_reason=_FINISH_REASONS[summary.finish_reason],
        prompt_tokens=summary.usage.prompt_tokens,
        mix=_mix(summary.mix),
        route=_decision(summary.route) if summary.HasField("route") else None,
        prompt_logprobs=tuple(summary.prompt_logprobs),
        top_logprobs=tuple(place for chunk in chunks for place in chunk.top_logprobs),
    )
