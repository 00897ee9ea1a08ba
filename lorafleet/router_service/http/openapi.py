"""The HTTP API in the words of OpenAPI 3.1.

What callers may send is read off the models that check it (:mod:`lorafleet.router_service.http.requests`); what they
get is written down here, and held to the real answers by the tests.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from lorafleet import __version__
from lorafleet.router_service.http.bodies import MAX_BODY_BYTES, MAX_CONTAINERS
from lorafleet.router_service.http.errors import HTTP_STATUS
from lorafleet.router_service.http.requests import (
    NOT_IMPLEMENTED,
    WITHOUT_EFFECT,
    ChatQuestion,
    CompletionQuestion,
    Question,
)

Json = dict[str, Any]
_REF: Final = "#/components/schemas/"


def document() -> Json:
    """The whole description, as a new object."""
    return copy.deepcopy(_document())


@cache
def document_json() -> bytes:
    """The same, written down."""
    return json.dumps(_document(), ensure_ascii=False, indent=1).encode()


@cache
def _document() -> Json:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lorafleet",
            "version": __version__,
            "description": "OpenAI's API over mixtures of LoRA adapters. What lorafleet adds to it stands in answers "
            f"under `lorafleet`. A body has at most {MAX_BODY_BYTES} bytes, and {MAX_CONTAINERS} arrays and objects.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {
                "post": _generating("Answer a conversation.", ChatQuestion, "ChatCompletion", "ChatCompletionChunk")
            },
            "/v1/completions": {
                "post": _generating("Continue a text.", CompletionQuestion, "Completion", "CompletionChunk")
            },
            "/v1/models": {
                "get": _operation(
                    "listModels", "The base, `auto`, and the adapters that the caller may use.", _json("ModelList")
                )
            },
            "/v1/models/{model}": {
                "get": {
                    **_operation("getModel", "One of them.", _json("Model"), 400, 404),
                    "parameters": [
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "description": "`base`, `auto` or a reference, whose slash stands as it is.",
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ],
                }
            },
            "/health": {
                "get": {
                    **_operation("getHealth", "Whether the service serves; open to all.", _json("Health")),
                    "security": [],
                    "responses": {
                        "200": _response("It serves.", _json("Health")),
                        "503": _response("It does not yet, or not any more.", _json("Health")),
                    },
                }
            },
            "/metrics": {
                "get": _operation(
                    "getMetrics",
                    "Of all tenants, in Prometheus' text format; needs the scope `metrics`.",
                    {"text/plain": {"schema": {"type": "string"}}},
                    scope="metrics",
                )
            },
            "/openapi.json": {
                "get": _operation(
                    "getDescription", "This description.", {"application/json": {"schema": {"type": "object"}}}
                )
            },
        },
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key; `lorafleet key create` makes one.",
                }
            },
            "headers": _HEADERS,
            "schemas": {**_questions(), **_ANSWERS},
        },
    }


def _generating(words: str, question: type[Question], answer: str, chunk: str) -> Json:
    found = _operation(
        answer[0].lower() + answer[1:],
        words,
        {
            **_json(answer),
            "text/event-stream": {"schema": _event(chunk)},
        },
        400, 404, 504,
    )  # fmt: skip
    body = {"required": True, "content": _json(question.__name__)}
    return {**found, "requestBody": body}


def _event(chunk: str) -> Json:
    """One of a stream's; OpenAPI 3.1 has no word for the stream itself."""
    return {
        "type": "object",
        "description": "With `stream`: one event. The last one is `data: [DONE]`, or, where something went wrong after "
        "the beginning, an error.",
        "properties": {
            "data": {
                "type": "string",
                "if": {"const": "[DONE]"},
                "else": {
                    "contentMediaType": "application/json",
                    "contentSchema": {"anyOf": [{"$ref": _REF + chunk}, {"$ref": _REF + "Error"}]},
                },
            }
        },
        "required": ["data"],
    }


# What stands beside a status, whichever endpoint it is of.
_WORDS: Final[Mapping[int, str]] = {
    400: "A field that is unknown, not implemented or cannot work; `param` names it. Or an adapter for another base.",
    401: "No key, or one that opens nothing.",
    403: "A key without the scope, which is named.",
    404: "What does not exist, or is not the caller's to use: the words are the same.",
    429: "More at once than the server takes, or than a quota allows.",
    500: "An error of the server's; the message names an incident.",
    503: "The service is stopping, or its database does not answer.",
    504: "The call took too long.",
}


def _operation(name: str, words: str, content: Json, *statuses: int, scope: str = "infer") -> Json:
    failures = {
        str(status): _response(_WORDS[status], _json("Error"), status)
        for status in sorted({401, 403, 429, 500, 503, *statuses})
    }
    return {
        "operationId": name,
        "summary": words,
        "description": f"Needs a key with the scope `{scope}`.",
        "responses": {
            "200": _response("As asked for.", content),
            **failures,
            "default": _response("Anything else that went wrong.", _json("Error")),
        },
    }


def _response(words: str, content: Json, status: int = 200) -> Json:
    names = ["x-request-id"]
    names += ["retry-after", "x-should-retry"] if status in (429, 503) else []
    names += ["www-authenticate"] if status == 401 else []
    names += [name for name in _HEADERS if name.startswith("x-ratelimit")]
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": words, "headers": headers, "content": content}


def _json(name: str) -> Json:
    return {"application/json": {"schema": {"$ref": _REF + name}}}


# What callers may send


def _questions() -> dict[str, Json]:
    """As the models check it, and as ``parse`` prepares it: a null is a field that is not there."""
    kinds: tuple[type[Question], ...] = (CompletionQuestion, ChatQuestion)
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF + "{model}")
    schemas: dict[str, Json] = found["$defs"]
    for kind in kinds:
        schema = schemas[kind.__name__]
        properties, required = schema["properties"], schema["required"]
        for name, one in properties.items():
            if name not in required:
                properties[name] = _or_null(one)
        for name, neutral in NOT_IMPLEMENTED.items():
            if name not in properties:
                properties[name] = {
                    "description": "Not implemented: taken only where it asks for nothing.",
                    "enum": [*neutral, None],
                }
        for name in sorted(WITHOUT_EFFECT):
            properties[name] = {"description": "Changes nothing."}
        schema["additionalProperties"] = {"type": "null"}
    schemas["Message"]["additionalProperties"] = {"type": "null"}
    return {name: _untitled(schema) for name, schema in schemas.items()}


def _or_null(schema: Json) -> Json:
    told: Json = {name: schema[name] for name in ("default", "description") if name in schema}
    rest = {name: value for name, value in schema.items() if name not in told}
    if {"type": "null"} in rest.get("anyOf", ()):
        # Bounds of a field that may be null anyway stand beside its types; they speak of numbers only.
        return schema
    return {"anyOf": [rest, {"type": "null"}], **told}


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes of names."""
    if isinstance(schema, dict):
        return {
            name: _untitled(value) for name, value in schema.items() if not (name == "title" and isinstance(value, str))
        }
    return [_untitled(one) for one in schema] if isinstance(schema, list) else schema


# What they get


def _object(optional: Mapping[str, Any] | None = None, /, **required: Any) -> Json:
    """An object with just these properties."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Json:
    return {"$ref": _REF + name}


_STRING: Final[Json] = {"type": "string"}
_INTEGER: Final[Json] = {"type": "integer"}
_COUNT: Final[Json] = {"type": "integer", "minimum": 0}
_NUMBER: Final[Json] = {"type": "number"}
_REASON: Final[Json] = {"type": "string", "enum": ["stop", "length"]}

_TOKEN_LOGPROB: Final[Json] = {"token": _STRING, "logprob": _NUMBER, "bytes": _nullable(_list(_INTEGER))}
_LAST: Final[Json] = {"usage": _ref("Usage"), "lorafleet": _ref("Answered")}


def _answer(kind: str, choice: Json, *, last: Json | None = None) -> Json:
    """A whole answer, or with ``last`` a part of one, which only the last ones have."""
    head = {
        "id": _STRING,
        "created": _COUNT,
        "model": {"type": "string", "description": "As it was asked for."},
        "system_fingerprint": {"type": "string", "description": "The base's digest."},
        "object": {"const": kind},
        "choices": _list(choice),
    }
    return _object(**head, **_LAST) if last is None else _object(last, **head)


_COMPLETION_CHOICE: Final[Json] = {"index": _COUNT, "text": _STRING, "logprobs": _nullable(_ref("CompletionLogprobs"))}

_ANSWERS: Final[dict[str, Json]] = {
    "ChatCompletion": _answer(
        "chat.completion",
        _object(
            index=_COUNT,
            message=_object(role={"const": "assistant"}, content=_STRING, refusal={"type": "null"}),
            logprobs=_nullable(_ref("ChatLogprobs")),
            finish_reason=_REASON,
        ),
    ),
    "ChatCompletionChunk": _answer(
        "chat.completion.chunk",
        _object(
            index=_COUNT,
            delta=_object({"role": {"const": "assistant"}, "content": _STRING}),
            logprobs=_nullable(_ref("ChatLogprobs")),
            finish_reason=_nullable(_REASON),
        ),
        last=_LAST,
    ),
    "ChatLogprobs": _object(
        content=_list(_object(**_TOKEN_LOGPROB, top_logprobs=_list(_object(**_TOKEN_LOGPROB)))),
        refusal={"type": "null"},
    ),
    "Completion": _answer("text_completion", _object(**_COMPLETION_CHOICE, finish_reason=_REASON)),
    "CompletionChunk": _answer(
        "text_completion", _object(**_COMPLETION_CHOICE, finish_reason=_nullable(_REASON)), last=_LAST
    ),
    "CompletionLogprobs": _object(
        tokens=_list(_STRING),
        token_logprobs=_list(_NUMBER),
        top_logprobs=_list({"type": "object", "additionalProperties": _NUMBER}),
        text_offset=_list(_COUNT),
    ),
    "Usage": _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
    "Answered": _object(
        mix={
            **_list(_object(name=_STRING, digest=_STRING, weight=_NUMBER)),
            "description": "What answered; empty for the bare base.",
        },
        route={
            **_nullable(
                _object(
                    router=_STRING,
                    reason=_STRING,
                    candidates=_list(
                        _object(
                            name=_STRING,
                            digest=_nullable(_STRING),
                            score=_nullable(_NUMBER),
                            probability=_NUMBER,
                            weight=_NUMBER,
                        )
                    ),
                )
            ),
            "description": "What the router decided, and why; null where it was not asked.",
        },
    ),
    "Model": _object(
        id=_STRING,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_STRING,
        root={"type": "string", "description": "A digest: of the base's weights or of the adapter's."},
        parent=_nullable({"const": "base"}),
        max_model_len=_COUNT,
        permission={"type": "array", "maxItems": 0},
    ),
    "ModelList": _object(object={"const": "list"}, data=_list(_ref("Model"))),
    "Health": _object(status={"enum": ["serving", "not serving"]}),
    "Error": _object(
        error=_object(
            message=_STRING,
            type=_STRING,
            param=_nullable(_STRING),
            code=_nullable(_STRING),
        )
    ),
}

_HEADERS: Final[dict[str, Json]] = {
    "x-request-id": {"description": "As it was sent, if it is a sane one; else a new one.", "schema": _STRING},
    "retry-after": {"description": "Seconds until it may be tried again.", "schema": _STRING},
    "x-should-retry": {"description": "`false` where no time helps.", "schema": _STRING},
    "www-authenticate": {"description": "`Bearer`.", "schema": _STRING},
    **{
        f"x-ratelimit-{what}-{of}": {"description": f"Of a tenant's minute, {of}: {words}.", "schema": _STRING}
        for of in ("requests", "tokens")
        for what, words in (("limit", "all"), ("remaining", "what is left"), ("reset", "until the next one"))
    },
}

assert set(_WORDS) <= set(HTTP_STATUS.values())
