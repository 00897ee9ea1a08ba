"""The endpoints: shells around ``answering``, in the words of OpenAI's API."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Final

from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from lorafleet.assets.chat_template import render_turns
from lorafleet.engine import SamplingParams
from lorafleet.router_service.answering import AUTO_MODEL, BASE_MODEL, Answering, Prompt
from lorafleet.router_service.authentication import Authenticator
from lorafleet.router_service.http import openapi, replies
from lorafleet.router_service.http.bodies import read_json
from lorafleet.router_service.http.door import OPEN, Door, caller
from lorafleet.router_service.http.errors import error_response
from lorafleet.router_service.http.rate_limits import RateLimitHeaders
from lorafleet.router_service.http.requests import ChatQuestion, CompletionQuestion, Question, parse
from lorafleet.router_service.http.streams import CallStream, events, results, while_connected
from lorafleet.router_service.http.trails import Trails, trail_of
from lorafleet.router_service.metrics import CONTENT_TYPE, Metrics
from lorafleet.router_service.tickets import before
from lorafleet.router_service.trail import Begin, untraced
from lorafleet.router_service.waiting import Workers

_GONE = 499  # nginx's word for a caller that did not wait; nobody reads it
_SPARE_THREADS = 8
CALLERS_PER_CALL: Final = 4
"""So many requests of callers whose keys are good may be there for each that is admitted: one tenant alone has half."""


class HttpApp:
    """The ASGI application. What waits for the registry or for an adapter does so on a thread, the rest in the loop."""

    def __init__(
        self,
        answering: Answering,
        authenticator: Authenticator,
        metrics: Metrics,
        *,
        max_calls: int,
        longest_call_s: float,
        begin: Begin = untraced,
    ) -> None:
        """``begin``: where traces of calls are kept."""
        self._answering, self._metrics, self._longest_call_s = answering, metrics, longest_call_s
        self.serving = False
        """What /health says."""
        self.routes = [
            Route("/health", self._health),
            Route("/metrics", self._read_metrics),
            Route("/openapi.json", self._describe),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
        ]
        # A thread for each admitted call: a router's scores may take their time.
        self._workers = Workers(max_calls + _SPARE_THREADS, "lorafleet-http")
        self._door = Door(
            Router(self.routes, redirect_slashes=False), authenticator, most_calls=CALLERS_PER_CALL * max_calls
        )
        self._app = Trails(
            RateLimitHeaders(
                ExceptionMiddleware(
                    self._door,
                    handlers={ClientDisconnect: _no_answer, HTTPException: error_response, Exception: error_response},
                ),
                lambda key: self._answering.limits(key),
            ),
            self.routes,
            quiet=OPEN.__contains__,
            begin=begin,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # so that the router raises what it does not find, instead of answering in its own words
        await self._app(scope, receive, send)

    def close(self) -> None:
        """Ends the threads; no request may run any more."""
        self._workers.close()
        self._door.close()

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "serving" if self.serving else "not serving"}, 200 if self.serving else 503)

    async def _read_metrics(self, _request: Request) -> Response:
        return Response(await self._workers.run(self._metrics.text), media_type=CONTENT_TYPE)

    async def _describe(self, _request: Request) -> Response:
        return Response(openapi.document_json(), media_type="application/json")

    async def _models(self, request: Request) -> Response:
        usable = await self._workers.run(self._answering.usable, caller(request))
        engine = self._answering.engine
        return JSONResponse(
            replies.model_list(usable, base_digest=engine.base_digest, context_tokens=engine.context_tokens)
        )

    async def _model(self, request: Request) -> Response:
        name, engine = request.path_params["model"], self._answering.engine
        version = None
        if name not in (BASE_MODEL, AUTO_MODEL):
            version = await self._workers.run(self._answering.resolve, caller(request), name)
        return JSONResponse(replies.model_card(name, version, engine.base_digest, engine.context_tokens))

    async def _completions(self, request: Request) -> Response:
        question = parse(CompletionQuestion, await read_json(request))
        return await self._answer(request, question, question.prompts(), question.sampling(), replies.CompletionForm())

    async def _chat_completions(self, request: Request) -> Response:
        question = parse(ChatQuestion, await read_json(request))
        engine = self._answering.engine
        turns = [message.turn() for message in question.messages]
        prompt = await self._workers.run(partial(render_turns, engine.tokenizer, turns, answering=True))
        sampling = question.sampling(context_tokens=engine.context_tokens)
        return await self._answer(request, question, [prompt], sampling, replies.ChatForm())

    async def _answer(
        self,
        request: Request,
        question: Question,
        prompts: Sequence[Prompt],
        sampling: Sequence[SamplingParams],
        form: replies.Form,
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + self._longest_call_s
        trail = trail_of(request.scope)
        trail.note("gen_ai.operation.name", form.operation)
        call = self._answering.call(caller(request), trail)
        stream: CallStream | None = None
        try:
            submit = partial(
                self._answering.answer,
                call,
                prompts,
                model=question.named_model,
                mix=question.mix,
                sampling=sampling,
            )
            answer = await before(deadline, while_connected(request, self._workers.run(submit)))
            reply = replies.Reply(
                form,
                answer,
                number=uuid.uuid4().hex,
                model=question.model,
                created=int(time.time()),
                base_digest=self._answering.engine.base_digest,
                tokenizer=self._answering.engine.tokenizer,
            )
            if question.stream:
                usage = question.stream_options.include_usage
                content = events(reply, answer.tickets, usage=usage, deadline=deadline, trail=trail)
                stream = CallStream(content, call, deadline=deadline)
                return stream
            generations = await while_connected(request, results(answer.tickets, deadline=deadline))
            # On a thread: with log-probabilities it decodes a hundred thousand tokens, one by one.
            return await self._workers.run(lambda: JSONResponse(reply.whole(generations)))
        finally:
            if stream is None:
                call.end()


async def _no_answer(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_GONE)
