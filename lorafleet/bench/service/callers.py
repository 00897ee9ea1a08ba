"""Callers of the service, in a process of their own: ``python -m lorafleet.bench.service.callers RUN OUTCOMES``.

One event loop sends every ask at its time (open loop: what is slow is not asked less), or keeps a number of callers
busy. Nothing of the service is imported: a caller knows its protocols.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import httpx
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from lorafleet.bench.service.asks import LOST, Ask, Outcome, Run, write_outcomes
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc

LOST_AFTER_S: Final = 5.0
"""Behind its deadline a call that has not ended never will."""
_STATUS: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_STATUS_OF_CODE: Final = {"overloaded": "RESOURCE_EXHAUSTED", "quota_exceeded": "RESOURCE_EXHAUSTED"}
"""Errors within a stream have a code and no HTTP status."""


class _Answered(NamedTuple):
    status: str = "OK"
    first_s: float | None = None
    tokens: int = 0
    answer: tuple[int | str, ...] = ()
    digests: dict[str, float] = {}  # noqa: RUF012 (never changed)
    retry_after_s: float | None = None
    message: str = ""


class Callers:
    """Sends asks to one service over gRPC and HTTP."""

    def __init__(self, run: Run) -> None:
        self._run = run
        options = [("grpc.use_local_subchannel_pool", 1)]  # else channels to one address share a connection
        self._channels = [grpc.aio.insecure_channel(run.grpc, options=options) for _ in range(run.channels)]
        stubs = [router_pb2_grpc.RouterServiceStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]
        self._stubs = itertools.cycle(stubs)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=f"http://{run.http}", timeout=run.timeout_s, limits=limits)
        self._doors: dict[str, Callable[[Ask], Awaitable[_Answered]]] = {
            "generate": self._generate,
            "route": self._route,
            "completion": self._complete,
        }
        self._outcomes: list[Outcome | None] = [None] * len(run.asks)
        self._began = 0.0

    async def all(self) -> list[Outcome | None]:
        """What became of each ask; None for one that was not sent."""
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        self._began = asyncio.get_running_loop().time()
        try:
            await (self._open() if self._run.callers is None else self._closed(self._run.callers))
        finally:
            await self._http.aclose()
            await asyncio.gather(*(channel.close(0) for channel in self._channels))
        return self._outcomes

    async def _open(self) -> None:
        tasks = set()
        for number in sorted(range(len(self._run.asks)), key=lambda number: self._run.asks[number].at_s):
            ask = self._run.asks[number]
            if self._run.seconds is not None and ask.at_s >= self._run.seconds:
                break
            if (wait_s := ask.at_s - self._now()) > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.create_task(self._one(number, at_s=ask.at_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(set(tasks))

    async def _closed(self, callers: int) -> None:
        numbers = iter(range(len(self._run.asks)))

        async def caller() -> None:
            for number in numbers:
                if self._run.seconds is not None and self._now() >= self._run.seconds:
                    return
                await self._one(number, at_s=self._now())

        await asyncio.gather(*(caller() for _ in range(callers)))

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    async def _one(self, number: int, *, at_s: float) -> None:
        ask, sent_s = self._run.asks[number], self._now()
        try:
            async with asyncio.timeout(self._run.timeout_s + LOST_AFTER_S):
                found = await self._doors[ask.door](ask)
        except TimeoutError:
            found = _Answered(LOST)
        self._outcomes[number] = Outcome(**found._asdict(), at_s=at_s, sent_s=sent_s, ended_s=self._now())

    async def _generate(self, ask: Ask) -> _Answered:
        sampling = router_pb2.Sampling(max_tokens=ask.max_tokens, ignore_eos=True)
        request = router_pb2.GenerateRequest(prompt=ask.prompt, model=ask.model, mix=ask.mix, sampling=sampling)
        first_s: float | None = None
        ids: list[int] = []
        digests: dict[str, float] = {}
        try:
            async for part in next(self._stubs).Generate(request, metadata=_bearer(ask), timeout=self._run.timeout_s):
                if part.HasField("summary"):
                    digests = {component.digest: component.weight for component in part.summary.mix}
                    continue
                if first_s is None:
                    first_s = self._now()
                ids += part.token_ids
        except grpc.aio.AioRpcError as error:
            return _refused(error)._replace(first_s=first_s, tokens=len(ids))
        return _Answered(first_s=first_s, tokens=len(ids), answer=self._kept(ids), digests=digests)

    async def _route(self, ask: Ask) -> _Answered:
        request = router_pb2.RouteRequest(text=ask.prompt)
        try:
            response = await next(self._stubs).Route(request, metadata=_bearer(ask), timeout=self._run.timeout_s)
        except grpc.aio.AioRpcError as error:
            return _refused(error)
        return _Answered(digests={component.digest: component.weight for component in response.decision.mix})

    async def _complete(self, ask: Ask) -> _Answered:
        body: dict[str, Any] = {
            "model": ask.model or "base", "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0.0,
            "ignore_eos": True, "stream": True, "logprobs": 0,
        }  # fmt: skip
        if ask.mix:
            body["mix"] = dict(ask.mix)
        first_s: float | None = None
        texts: list[str] = []
        try:
            async with self._http.stream(
                "POST", "/v1/completions", json=body, headers={"authorization": f"Bearer {ask.key}"}
            ) as response:
                if response.status_code != 200:
                    error = json.loads(await response.aread())["error"]
                    retry = response.headers.get("retry-after")
                    return _Answered(
                        _STATUS.get(response.status_code, "INTERNAL"),
                        retry_after_s=None if retry is None else float(retry),
                        message=error["message"],
                    )
                digests: dict[str, float] | None = None
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    part = json.loads(line.removeprefix("data: "))
                    if "error" in part:
                        status = _STATUS_OF_CODE.get(part["error"]["code"], part["error"]["code"].upper())
                        return _Answered(status, first_s, len(texts), message=part["error"]["message"])
                    for choice in part["choices"]:
                        if choice["logprobs"] is not None:
                            first_s = self._now() if first_s is None else first_s
                            texts += choice["logprobs"]["tokens"]
                    if "lorafleet" in part:
                        digests = {one["digest"]: one["weight"] for one in part["lorafleet"]["mix"]}
        except httpx.TimeoutException as error:
            return _Answered("DEADLINE_EXCEEDED", first_s, len(texts), message=str(error))
        except httpx.TransportError as error:
            return _Answered("UNAVAILABLE", first_s, len(texts), message=f"{type(error).__name__}: {error}")
        if digests is None:
            return _Answered("UNAVAILABLE", first_s, len(texts), message="the stream ended before its last part")
        return _Answered(first_s=first_s, tokens=len(texts), answer=self._kept(texts), digests=digests)

    def _kept(self, answer: list[Any]) -> tuple[int | str, ...]:
        return tuple(answer) if self._run.keep_answers else ()


def _bearer(ask: Ask) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {ask.key}"),)


def _refused(error: grpc.aio.AioRpcError) -> _Answered:
    return _Answered(error.code().name, retry_after_s=_retry_after(error), message=(error.details() or "")[:300])


def _retry_after(error: grpc.aio.AioRpcError) -> float | None:
    """The delay of a google.rpc.RetryInfo among an error's details; None where there is none."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                retry = error_details_pb2.RetryInfo()
                if detail.Unpack(retry):
                    delay: float = retry.retry_delay.ToNanoseconds() / 1e9
                    return delay
    return None


def main(run_file: str, outcomes_file: str) -> None:
    run = Run.read(Path(run_file))
    gc.freeze()  # a collection that walks all asks takes as long as several calls

    async def ask() -> list[Outcome | None]:
        return await Callers(run).all()

    write_outcomes(asyncio.run(ask()), Path(outcomes_file))


if __name__ == "__main__":
    main(*sys.argv[1:])
