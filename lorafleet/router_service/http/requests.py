"""What callers may send, field by field: what would change the answer is obeyed or refused, never passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorafleet.engine import SamplingParams
from lorafleet.engine.residency import MAX_WEIGHT
from lorafleet.engine.sampling import MAX_STOPS, MAX_TOP_LOGPROBS
from lorafleet.router_service.answering import BASE_MODEL, Prompt
from lorafleet.router_service.http.errors import BadRequestError

T = TypeVar("T")
# The first wrong value is told and the rest not looked at: 340,000 wrong ones fit into a body, and an error for each
# would take seconds of the event loop and a gigabyte.
List = Annotated[list[T], Field(fail_fast=True)]
MAX_CHOICES: Final = 16
_COMPLETION_TOKENS: Final = 16
"""OpenAI's default for /v1/completions."""

# Fields of OpenAI's API that say who asks or how the answer is kept, and leave the answer as it is.
WITHOUT_EFFECT: Final = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"})
# Those that are not implemented, with the values at which they ask for nothing.
NOT_IMPLEMENTED: Final[Mapping[str, Sequence[Any]]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


def _told(default: Any = ..., **bounds: Any) -> Any:
    """A field whose values the engine checks; what it takes is told to callers, in words of JSON Schema."""
    if isinstance(default, dict | list):
        return Field(default_factory=type(default), json_schema_extra={"default": default, **bounds})
    return Field(default, json_schema_extra=bounds)


class _Strict(BaseModel):
    # What stands below a field in quotes is its description for callers.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    """A last event has the tokens that were used."""


_TEXT: Final = {"type": "string", "minLength": 1}
_TOKEN: Final = {"type": "integer", "minimum": 0}


class Question(_Strict):
    """What both endpoints take. Values are checked where they are used: by the engine, in its words."""

    model: str
    """`base`, `auto`, or a reference: TENANT/ADAPTER, TENANT/ADAPTER@ALIAS or TENANT/ADAPTER:VERSION."""
    mix: dict[str, float] = _told(
        {}, additionalProperties={"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT}
    )
    """Reference to weight, used as given; beside the model `base`."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Choices for each prompt."""
    stream: bool = False
    """The answer in server-sent events."""
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    """16 for a completion, the rest of the context for a chat, unless given."""
    temperature: float = _told(1.0, minimum=0)
    """0: the likeliest token."""
    top_p: float = _told(1.0, exclusiveMinimum=0, maximum=1)
    """Keeps the likeliest tokens whose probabilities add up to this."""
    top_k: int = _told(0, minimum=0)
    """Keeps so many of the likeliest tokens; 0: all."""
    min_p: float = _told(0.0, minimum=0, maximum=1)
    """Keeps the tokens at least this likely, as a share of the likeliest one."""
    presence_penalty: float = _told(0.0, minimum=-2, maximum=2)
    """Is taken from the logits of generated tokens."""
    frequency_penalty: float = _told(0.0, minimum=-2, maximum=2)
    """Is taken from the logits of generated tokens once for each time."""
    repetition_penalty: float = _told(1.0, minimum=0.01, maximum=100)
    """Divides the logits of tokens in the prompt or generated; multiplies negative ones."""
    logit_bias: dict[str, float] = _told(
        {},
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    )
    """Token to what is added to its logit."""
    min_tokens: int = _told(0, minimum=0)
    """So many tokens at least; not more than the most."""
    seed: int | None = None
    """Makes sampling reproducible; each choice counts one up from it."""
    stop: str | List[str] = _told([], anyOf=[_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}])
    """The generation ends before the first of these texts."""
    stop_token_ids: List[int] = _told([], items=_TOKEN, maxItems=MAX_STOPS)
    """The generation ends before the text of the first of these tokens."""
    ignore_eos: bool = False
    """Goes on after an end of text."""

    _sampling: ClassVar[Sequence[str]] = (
        "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    )  # fmt: skip

    @property
    def named_model(self) -> str:
        """As ``Answering.answer`` takes it: a mix stands instead of the bare base."""
        return "" if self.mix and self.model == BASE_MODEL else self.model

    def _params(self, *, max_tokens: int, logprobs: int | None) -> list[SamplingParams]:
        """One for each of the ``n`` choices; with a seed each has one of its own, counted up from it.

        ``logprobs``: None for none, else how many of the likeliest tokens beside the chosen one.
        """
        shared = {name: getattr(self, name) for name in self._sampling}
        bias = {_token("logit_bias", token): value for token, value in self.logit_bias.items()}
        return [
            SamplingParams(
                **shared,
                max_tokens=max_tokens,
                logit_bias=bias,
                seed=None if self.seed is None else self.seed + number,
                logprobs=logprobs is not None,
                top_logprobs=logprobs or 0,
            )
            for number in range(self.n)
        ]


class CompletionQuestion(Question):
    prompt: str | List[str] | List[int] | List[List[int]] = _told(
        anyOf=[
            _TEXT,
            {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_CHOICES},
            {"type": "array", "items": _TOKEN, "minItems": 1},
            {
                "type": "array",
                "items": {"type": "array", "items": _TOKEN, "minItems": 1},
                "minItems": 1,
                "maxItems": MAX_CHOICES,
            },
        ]
    )
    """A text, token ids, which are taken as they are, or a list of either; prompts times choices are at most 16."""
    logprobs: int | None = _told(None, minimum=0, maximum=MAX_TOP_LOGPROBS)
    """Log-probabilities of the generated tokens, and of so many of the likeliest ones in their place."""

    def prompts(self) -> list[Prompt]:
        """One or several; token ids are taken as they are."""
        found = self.prompt
        if isinstance(found, str):
            return [found]
        several: list[Any] = [found] if found and isinstance(found[0], int) else list(found)
        if not several:
            raise BadRequestError("found no prompt, expected a text, token ids, or a list of either", "prompt")
        if len(several) * self.n > MAX_CHOICES:
            raise BadRequestError(
                f"found {len(several)} prompts with {self.n} choices each, expected at most {MAX_CHOICES} in all; send "
                "several requests, which run in one batch all the same",
                "prompt",
            )
        return several

    def sampling(self) -> list[SamplingParams]:
        return self._params(max_tokens=self.max_tokens or _COMPLETION_TOKENS, logprobs=self.logprobs)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | List[TextPart]

    def turn(self) -> dict[str, str]:
        """As chat templates take it; they know no developer, which is the system under its newer name."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatQuestion(Question):
    messages: List[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of `max_tokens`: one of them, or both alike."""
    logprobs: bool = False
    """Log-probabilities of the generated tokens."""
    top_logprobs: int | None = _told(None, minimum=0, maximum=MAX_TOP_LOGPROBS)
    """And of so many of the likeliest ones in their place; with `logprobs`."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def sampling(self, *, context_tokens: int) -> list[SamplingParams]:
        """Without a limit of its own an answer ends with the context, or before."""
        limit = self.max_completion_tokens or self.max_tokens or context_tokens
        return self._params(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


Q = TypeVar("Q", bound=Question)


def parse(kind: type[Q], body: Mapping[str, Any]) -> Q:
    """Raises BadRequestError, which names the field, for what is unknown, not implemented, or no value for it."""
    fields = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    for name, neutral in NOT_IMPLEMENTED.items():
        if name in fields and name not in kind.model_fields and not _is_one_of(fields.pop(name), neutral):
            raise BadRequestError(f"{name!r} is not implemented here; leave it out", name)
    if isinstance(fields.get("messages"), list):  # what came back in an answer has nulls, and may be sent again
        fields["messages"] = [
            {name: value for name, value in one.items() if value is not None} if isinstance(one, dict) else one
            for one in fields["messages"]
        ]
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        unknown = first["type"] == "extra_forbidden"
        # Of a union's members pydantic names the types, too, which are no part of the field's name.
        within = first["loc"][1:]
        path = [*first["loc"][:1], *(part for part in within if isinstance(part, int) or part in _NESTED)]
        if unknown and within:
            path.append(within[-1])
        param = ".".join(map(str, path)) or None
        words = "is not a field of this API" if unknown else first["msg"]
        raise BadRequestError(f"{param or 'the body'}: {words}", param) from None


_NESTED: Final = frozenset({*Message.model_fields, *TextPart.model_fields, *StreamOptions.model_fields})


def _is_one_of(value: Any, neutral: Sequence[Any]) -> bool:
    """In JSON 0 and false differ, which are equal in Python."""
    return any(type(value) is type(one) and value == one for one in neutral)


def _token(field: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise BadRequestError(f"{field}: found the token {text[:40]!r}, expected the number of a token", field)
    return int(text)
