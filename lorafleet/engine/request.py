"""A request inside the engine, and what comes out of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

from lorafleet.engine.detokenizer import Decode, Detokenizer, StopFinder
from lorafleet.engine.sampling import SamplingParams, TokenLogprob, start_history
from lorafleet.kernels import Mix, TokenRoute

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenChunk:
    """What one step added to a request: text that is settled, and all new tokens."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    """nats, one for each token; empty unless asked for"""
    top_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    """for each token the most likely ones in its place, the likeliest first; empty unless asked for"""


@dataclass(frozen=True)
class Generation:
    """A finished request."""

    token_ids: list[int]
    """generated tokens, with the one that ended the generation"""
    text: str
    """without special tokens; ends before a stop text or a stop token"""
    logprobs: list[float]
    """nats, one for each generated token; empty unless asked for"""
    finish_reason: FinishReason
    mix: dict[str, float]
    """adapter name → weight, as asked for, without zeros; empty where tokens were routed"""
    digests: dict[str, str]
    """adapter name → digest of the weights that answered, or that tokens were routed among"""
    prompt_logprobs: list[float] | None
    """nats, for the prompt's tokens 2…n; None unless asked for"""
    prompt_tokens: int
    top_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    """for each generated token the most likely ones in its place, the likeliest first; empty unless asked for"""


@dataclass(frozen=True)
class TokenMix:
    """Instead of a mix: every token is routed among these adapters, in each group of modules, by their own gates.

    The ``top_k`` adapters whose gate vectors fit a token's input best share it, by a softmax at ``temperature``.
    """

    adapters: tuple[str, ...]
    top_k: int = 2
    temperature: float = 1.0


@dataclass(frozen=True)
class ResolvedMix:
    """A mix by name together with the versions that the names meant when the request came."""

    weights: dict[str, float] = field(default_factory=dict)
    """empty where tokens are routed"""
    digests: dict[str, str] = field(default_factory=dict)
    gates: Mix | TokenRoute = ()
    """by digest, sorted, without zeros: what the request computes"""

    @cached_property  # the scheduler asks for it of every waiting request in every step
    def held(self) -> tuple[str, ...]:
        """Digests of the weights that the request may need."""
        return self.gates.keys if isinstance(self.gates, TokenRoute) else tuple(digest for digest, _ in self.gates)


class Request:
    """State of one request; touched by the stepping thread only."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        mix: ResolvedMix,
        sampling: SamplingParams,
        max_new: int,
        decode: Decode,
        salt: str = "",
        tenant: str = "",
        weight: float = 1.0,
    ) -> None:
        self.tokens = list(prompt)
        """prompt, then what was generated"""
        self.prompt_tokens = len(self.tokens)
        self.mix, self.sampling = mix, sampling
        self.max_new = max_new
        """most tokens to generate, within the context"""
        self.generator = random.Random(sampling.seed)
        self.history = start_history(sampling, self.tokens)
        """what penalties count; None where nothing is to be counted"""
        self.salt = salt
        """requests with different salts share no cached prefix"""
        self.tenant, self.weight = tenant, weight
        """those of a tenant are served in their order, tenants by what they had : weight"""
        self.computed = 0
        """tokens whose keys and values are in the cache"""
        self.pages: list[int] = []
        """where its keys and values lie, in the order of its tokens"""
        self.page_keys: list[bytes] = []
        """of the pages that are full and published"""
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[TokenLogprob]] = []
        self.prompt_logprobs: list[float] = []
        self._stop_tokens = frozenset(sampling.stop_token_ids)
        self._pieces: list[str] = []
        self._detokenizer = Detokenizer(decode)
        self._stops = StopFinder(sampling.stop)

    @property
    def pending(self) -> int:
        """Tokens that are known but not computed. When only scoring, the last one is never needed."""
        return len(self.tokens) - (1 if self.max_new == 0 else 0) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def accept(
        self,
        token: int,
        *,
        logprob: float | None,
        eos: frozenset[int],
        top_logprobs: Sequence[TokenLogprob] = (),
    ) -> tuple[TokenChunk, FinishReason | None]:
        """Append a generated token; the chunk to hand out, and why the request ends if it does."""
        self.tokens.append(token)
        if self.history is not None:
            self.history.add(token)
        logprobs = [] if logprob is None else [logprob]
        top = [list(top_logprobs)] if self.sampling.top_logprobs > 0 else []
        self.logprobs += logprobs
        self.top_logprobs += top
        text = ""
        reason: FinishReason | None = None
        if self._may_end and (token in self._stop_tokens or (token in eos and not self.sampling.ignore_eos)):
            reason = "stop"
        else:
            text = self._stops.push(self._detokenizer.push([token]), may_end=self._may_end)
            if self._stops.found:
                reason = "stop"
            elif self.generated >= self.max_new:
                reason = "length"
        if reason is not None:
            text += self._close()
            if self._stops.found:  # the last incomplete characters may have been the end of a stop text
                reason = "stop"
        self._pieces.append(text)
        return TokenChunk(text, [token], logprobs, top), reason

    def generation(self, reason: FinishReason) -> Generation:
        """The result; for a cancelled request what there is so far."""
        if reason == "cancelled":
            self._pieces.append(self._close())
        return Generation(
            token_ids=self.tokens[self.prompt_tokens :],
            text="".join(self._pieces),
            logprobs=self.logprobs,
            finish_reason=reason,
            mix=dict(self.mix.weights),
            digests=dict(self.mix.digests),
            prompt_logprobs=self.prompt_logprobs if self.sampling.prompt_logprobs else None,
            prompt_tokens=self.prompt_tokens,
            top_logprobs=self.top_logprobs,
        )

    @property
    def _may_end(self) -> bool:
        """Whether the last token may end the request before its full length."""
        return self.generated > self.sampling.min_tokens

    def _close(self) -> str:
        if self._stops.found:
            return ""
        tail = self._stops.push(self._detokenizer.flush(), may_end=self._may_end)
        return tail if self._stops.found else tail + self._stops.flush()
