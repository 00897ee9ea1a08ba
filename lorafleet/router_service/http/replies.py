"""Answers as OpenAI's API writes them, and beside them, under ``lorafleet``, what answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lorafleet.engine import Generation, TokenChunk
from lorafleet.registry.records import Version
from lorafleet.router_service.answering import AUTO_MODEL, BASE_MODEL, Answer, Decision, mix_by_digest, references
from lorafleet.router_service.routers import BASE

Json = dict[str, Any]


class TokenText(NamedTuple):
    text: str
    logprob: float
    """nats"""
    top: tuple[tuple[str, float], ...]
    """the likeliest tokens in its place"""


class Form(Protocol):
    """How one endpoint writes a choice: whole, or in pieces of a stream."""

    operation: str
    """in OpenTelemetry's words"""
    id_prefix: str
    kind: str
    """``object`` of a whole answer"""
    piece_kind: str

    def whole(self, index: int, text: str, reason: str, logprobs: Json | None) -> Json: ...

    def opening(self, index: int) -> Json | None:
        """What a stream begins a choice with; None for nothing."""
        ...

    def piece(self, index: int, text: str, reason: str | None, logprobs: Json | None) -> Json: ...

    def logprobs(self, tokens: Sequence[TokenText], *, offset: int) -> Json:
        """``offset``: characters of the choice's tokens before these."""
        ...


class ChatForm:
    operation = "chat"
    id_prefix, kind, piece_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self, index: int, text: str, reason: str, logprobs: Json | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, reason: str | None, logprobs: Json | None) -> Json:
        delta = {"content": text} if text or reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[TokenText], *, offset: int) -> Json:
        def one(text: str, logprob: float) -> Json:
            # A token may hold a part of a character, which has no text of its own.
            data = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": data}

        content = [{**one(t.text, t.logprob), "top_logprobs": [one(*other) for other in t.top]} for t in tokens]
        return {"content": content, "refusal": None}


class CompletionForm:
    operation = "text_completion"
    id_prefix, kind, piece_kind = "cmpl-", "text_completion", "text_completion"

    def whole(self, index: int, text: str, reason: str, logprobs: Json | None) -> Json:
        return self.piece(index, text, reason, logprobs)

    def opening(self, index: int) -> Json | None:
        return None

    def piece(self, index: int, text: str, reason: str | None, logprobs: Json | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[TokenText], *, offset: int) -> Json:
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token.text))
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # By text, as the API wants it: of tokens with the same text (parts of characters) the likeliest stays.
            "top_logprobs": [dict(reversed(token.top)) for token in tokens],
            "text_offset": offsets[:-1],
        }


class Reply:
    """One answer, written in one form; ``head`` is what all its parts have in common."""

    def __init__(
        self, form: Form, answer: Answer, *, number: str, model: str, created: int, base_digest: str, tokenizer: Any
    ) -> None:
        self._form, self._answer, self._tokenizer = form, answer, tokenizer
        self._head = {
            "id": form.id_prefix + number,
            "created": created,
            "model": model,
            "system_fingerprint": base_digest,
        }
        self._offsets = [0] * len(answer.tickets)

    def whole(self, generations: Sequence[Generation]) -> Json:
        choices = [
            self._form.whole(i, generation.text, generation.finish_reason, self._logprobs(i, generation))
            for i, generation in enumerate(generations)
        ]
        return {**self._frame(self._form.kind, choices), **self._end(generations), "usage": self._usage(generations)}

    def openings(self) -> list[Json]:
        found = (self._form.opening(i) for i in range(len(self._answer.tickets)))
        return [self._frame(self._form.piece_kind, [choice]) for choice in found if choice is not None]

    def piece(self, index: int, chunk: TokenChunk) -> Json | None:
        """None where a chunk brings nothing to tell: text may be held back until it is known to be no stop text."""
        logprobs = self._logprobs(index, chunk)
        if not chunk.text and logprobs is None:
            return None
        return self._frame(self._form.piece_kind, [self._form.piece(index, chunk.text, None, logprobs)])

    def closing(self, index: int, generation: Generation) -> Json:
        return self._frame(self._form.piece_kind, [self._form.piece(index, "", generation.finish_reason, None)])

    def usage(self, generations: Sequence[Generation]) -> Json:
        """A part of its own, without choices."""
        return {**self._frame(self._form.piece_kind, []), "usage": self._usage(generations)}

    def with_mix(self, part: Json, generations: Sequence[Generation]) -> Json:
        """The last part of a stream says what answered."""
        return {**part, **self._end(generations)}

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {**self._head, "object": kind, "choices": choices}

    def _end(self, generations: Sequence[Generation]) -> Json:
        mix = _components(mix_by_digest(generations[0]), references(self._answer.versions))
        decision = self._answer.decision
        return {"lorafleet": {"mix": mix, "route": None if decision is None else _route(decision)}}

    def _usage(self, generations: Sequence[Generation]) -> Json:
        """A prompt counts once, however many choices it has."""
        choices = len(generations) // self._answer.prompts
        prompt = sum(generation.prompt_tokens for generation in generations[::choices])
        completion = sum(len(generation.token_ids) for generation in generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, index: int, part: Generation | TokenChunk) -> Json | None:
        if not part.logprobs:
            return None
        tops: Sequence[Sequence[tuple[int, float]]] = part.top_logprobs or [()] * len(part.token_ids)
        tokens = [
            TokenText(self._text(token), logprob, tuple((self._text(other), value) for other, value in top))
            for token, logprob, top in zip(part.token_ids, part.logprobs, tops, strict=True)
        ]
        written = self._form.logprobs(tokens, offset=self._offsets[index])
        self._offsets[index] += sum(len(token.text) for token in tokens)
        return written

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


def model_list(versions: Sequence[Version], *, base_digest: str, context_tokens: int) -> Json:
    """The base, the router, and the adapters that the caller may use."""
    cards = [model_card(name, None, base_digest, context_tokens) for name in (BASE_MODEL, AUTO_MODEL)]
    cards += [
        model_card(f"{version.tenant}/{version.adapter}", version, base_digest, context_tokens) for version in versions
    ]
    return {"object": "list", "data": cards}


def model_card(name: str, version: Version | None, base_digest: str, context_tokens: int) -> Json:
    """``version``: None for the base and for the router's choice; ``root`` is a digest, never a place."""
    return {
        "id": name,
        "object": "model",
        "created": 0 if version is None else int(version.created_at),
        "owned_by": "lorafleet" if version is None else version.tenant,
        "root": base_digest if version is None else version.digest,
        "parent": None if name == BASE_MODEL else BASE_MODEL,
        "max_model_len": context_tokens,
        "permission": [],
    }


def _components(mix: Mapping[str, float], named: Mapping[str, str]) -> list[Json]:
    return [{"name": named[digest], "digest": digest, "weight": weight} for digest, weight in sorted(mix.items())]


def _route(decision: Decision) -> Json:
    named = {BASE: BASE_MODEL, **decision.references}
    return {
        "router": decision.router,
        "reason": decision.route.reason,
        "candidates": [
            {
                "name": named[scored.digest],
                "digest": scored.digest or None,
                "score": scored.score if math.isfinite(scored.score) else None,  # JSON has no infinity
                "probability": scored.probability,
                "weight": scored.weight,
            }
            for scored in decision.route.scores
        ],
    }
