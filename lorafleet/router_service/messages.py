"""Between the package's own types and the messages of lorafleet.router.v1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafleet.engine import Generation, SamplingParams, TokenChunk
from lorafleet.proto.router.v1 import router_pb2
from lorafleet.registry.records import Version
from lorafleet.router_service.answering import BASE_MODEL, Answer, Decision, mix_by_digest, references
from lorafleet.router_service.routers import BASE

FINISH_REASONS: Mapping[str, router_pb2.FinishReason] = {
    "stop": router_pb2.FINISH_REASON_STOP,
    "length": router_pb2.FINISH_REASON_LENGTH,
    "cancelled": router_pb2.FINISH_REASON_CANCELLED,
}


# Fields of Sampling with presence; what the others hold when they are not set is the engine's default, too.
_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "top_logprobs",
    "seed",
)


def sampling_params(request: router_pb2.GenerateRequest) -> SamplingParams:
    """The engine's parameters; a field that the caller left out has the engine's default."""
    sampling = request.sampling
    given: dict[str, Any] = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}
    return SamplingParams(
        **given,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logit_bias=dict(sampling.logit_bias),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )


def chunk(part: TokenChunk) -> router_pb2.GenerateResponse:
    return router_pb2.GenerateResponse(
        text=part.text,
        token_ids=part.token_ids,
        logprobs=part.logprobs,
        top_logprobs=[
            router_pb2.TopLogprobs(tokens=[router_pb2.TokenLogprob(token_id=t, logprob=value) for t, value in place])
            for place in part.top_logprobs
        ],
    )


def summary(generation: Generation, answer: Answer) -> router_pb2.GenerateSummary:
    message = router_pb2.GenerateSummary(
        finish_reason=FINISH_REASONS[generation.finish_reason],
        usage=router_pb2.Usage(prompt_tokens=generation.prompt_tokens, generated_tokens=len(generation.token_ids)),
        mix=components(mix_by_digest(generation), answer.versions),
        prompt_logprobs=generation.prompt_logprobs or (),
    )
    if answer.decision is not None:
        message.route.CopyFrom(decision(answer.decision))
    return message


def decision(decided: Decision) -> router_pb2.RouteDecision:
    named = decided.references
    candidates = [
        router_pb2.Candidate(
            reference=BASE_MODEL if scored.digest == BASE else named[scored.digest],
            digest=scored.digest,
            score=scored.score,
            probability=scored.probability,
            weight=scored.weight,
        )
        for scored in decided.route.scores
    ]
    return router_pb2.RouteDecision(
        router=decided.router,
        mix=_components(decided.route.mix, named),
        candidates=candidates,
        reason=decided.route.reason,
    )


def components(mix: Mapping[str, float], versions: Sequence[Version]) -> list[router_pb2.MixComponent]:
    return _components(mix, references(versions))


def _components(mix: Mapping[str, float], named: Mapping[str, str]) -> list[router_pb2.MixComponent]:
    return [router_pb2.MixComponent(reference=named[d], digest=d, weight=w) for d, w in sorted(mix.items())]


def adapter(version: Version) -> router_pb2.Adapter:
    lineage = version.lineage
    return router_pb2.Adapter(
        reference=version.reference,
        digest=version.digest,
        version=version.number,
        rank=version.rank,
        federation=lineage.federation if lineage else "",
        round=lineage.round if lineage else 0,
    )
