"""The engine: requests in, tokens out, one base model, many mixtures in the same batch."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lorafleet.adapters import LoraAdapter
from lorafleet.engine.block_attention import BlockAttention
from lorafleet.engine.block_pages import BlockPages
from lorafleet.engine.graphs import CudaCapture
from lorafleet.engine.kv_pages import PAGE_TOKENS, KvPages, pages_for
from lorafleet.engine.memory import KEPT_SHARE, default_adapter_bytes, default_host_bytes, kv_pages, pool_pages
from lorafleet.engine.mixture_linear import MixtureContext
from lorafleet.engine.model import LoadedBase, as_device, as_dtype, load_base
from lorafleet.engine.page_allocator import PageAllocator
from lorafleet.engine.prefix import CopiedPrefixes, Prefixes, SharedPrefixes
from lorafleet.engine.prompt import encode, is_text
from lorafleet.engine.request import FinishReason, Generation, Request, TokenMix
from lorafleet.engine.residency import Residency
from lorafleet.engine.runner import ModelRunner, Outcome
from lorafleet.engine.sampling import SamplingParams
from lorafleet.engine.scheduler import ScheduledRun, Scheduler
from lorafleet.engine.stats import EngineStats
from lorafleet.engine.ticket import Ticket
from lorafleet.engine.tiers import Read, Tiers
from lorafleet.engine.tile_pages import TilePages
from lorafleet.errors import InvalidInputError
from lorafleet.kernels import Bank, mixture_path
from lorafleet.kernels.bank import pool_page_bytes
from lorafleet.kernels.cost_model import fitted_model
from lorafleet.kernels.pool import PAGE_ROWS

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests for mixtures of LoRA adapters over one base. Every public method may be called from any thread.

    ``start`` runs a stepping thread. Without it, ``generate`` and waiting on a ticket step in the caller's thread.
    """

    def __init__(
        self,
        base: LoadedBase,
        *,
        context: MixtureContext,
        device: torch.device,
        max_sequences: int,
        max_batch_tokens: int,
        pages: int,
        kept_pages: int,
        pool_pages: int | None,
        adapter_bytes: int,
        host_bytes: int,
        read: Read,
    ) -> None:
        """Use :meth:`load`."""
        self._base = base
        blocks = BlockAttention.supports(device)
        cache = (TilePages if base.tiled_attention else BlockPages if blocks else KvPages)(
            layers=base.layers,
            kv_heads=base.kv_heads,
            head_dim=base.head_dim,
            pages=pages + kept_pages,
            device=device,
            dtype=base.dtype,
        )
        bank = Bank(base.groups, device=device, dtype=base.dtype, tiles=base.tiled, pool_pages=pool_pages)
        tiers = Tiers(
            bank,
            device_bytes=adapter_bytes,
            host_bytes=host_bytes,
            read=read,
            changed=self._adapters_changed,
        )
        self._residency = Residency(base, tiers)
        self._runner = ModelRunner(base, cache=cache, residency=self._residency, context=context, device=device)
        if blocks:
            most_pages = min(pages, pages_for(base.context_tokens))
            self._runner.use_graphs(bank, CudaCapture(device), max_sequences=max_sequences, most_pages=most_pages)
        self._pages = PageAllocator(pages)
        prefixes: Prefixes = SharedPrefixes(self._pages)
        if isinstance(cache, KvPages) and device.type == "cpu":
            prefixes = CopiedPrefixes(self._pages, kept=kept_pages, copy=cache.copy)
        self._scheduler = Scheduler(
            self._pages,
            prefixes,
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            claim=self._residency.claim,
            unclaim=self._residency.unclaim,
            expect=self._residency.expect,
            clear=cache.clear,
        )
        self._tickets: dict[Request, Ticket] = {}
        self._cancelled: set[Ticket] = set()
        self._finished_total = self._failed_total = 0
        self._prompt_tokens_total = self._generated_tokens_total = self._steps_total = 0
        self._stalled = False  # nothing runs, and all that waits waits for an adapter that is being loaded
        # _lock guards all of the above but the runner and the residency, which has its own; _step_lock makes steps one
        # at a time. Order: step, then lock, then the residency's.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._step_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False

    @classmethod
    def load(
        cls,
        base: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "bfloat16",
        max_sequences: int = 64,
        max_batch_tokens: int = 1024,
        kv_tokens: int | None = None,
        adapter_bytes: int | None = None,
        host_bytes: int | None = None,
        cost_model: str | Path | None = None,
        read: Read = LoraAdapter.load,
    ) -> Engine:
        """Load a base (the name of a shipped one, or a folder in HF format).

        ``max_sequences`` run at a time, others wait; a step computes at most ``max_batch_tokens`` tokens. Keys and
        values of ``kv_tokens`` tokens are kept, by default as many as the device's free memory allows; more load than
        that waits. Their memory is taken now, but where a CPU computes by torch's products (in float32, or without a
        matrix unit, a compiler or fitting widths): there it is taken as tokens come, and a quarter as many again are
        kept for later requests that begin alike. At most ``adapter_bytes`` of adapters' rows (on CUDA a pool of whole
        pages, taken now) are on the device and ``host_bytes`` in host memory, by default shares of what is free.

        ``dtype`` may be "auto": bfloat16 where the device multiplies it. ``cost_model`` is a file that ``lorafleet
        bench kernels --fit`` wrote on this machine; it chooses between kernel paths. ``read`` reads an adapter's
        folder. Raises NotFoundError where the base or the cost model is missing, InvalidInputError where the base is
        not supported or the cost model is another device's.
        """
        if not 1 <= max_sequences <= max_batch_tokens:
            raise InvalidInputError(
                f"found max_sequences {max_sequences} and max_batch_tokens {max_batch_tokens}, expected at least one "
                "sequence and at least as many tokens as sequences, so that all of them can go on in every step"
            )
        if adapter_bytes is not None and adapter_bytes < 1:
            raise InvalidInputError(f"found adapter_bytes {adapter_bytes}, expected at least 1")
        if host_bytes is not None and host_bytes < 0:
            raise InvalidInputError(f"found host_bytes {host_bytes}, expected at least 0")
        on = as_device(device)
        as_type = as_dtype(dtype, on)
        context = MixtureContext(
            mixture_path(model=None if cost_model is None else fitted_model(Path(cost_model), device=on.type))
        )
        loaded = load_base(base, device=on, dtype=as_type, context=context)
        page_bytes = KvPages.page_bytes(
            layers=loaded.layers, kv_heads=loaded.kv_heads, head_dim=loaded.head_dim, dtype=loaded.dtype
        )
        if kv_tokens is None:
            most = max_sequences * pages_for(loaded.context_tokens)
            pages = kv_pages(page_bytes=page_bytes, most_pages=most, device=on)
        elif kv_tokens < 1:
            raise InvalidInputError(f"found kv_tokens {kv_tokens}, expected at least 1")
        else:
            pages = pages_for(kv_tokens)
        kept_pages = 0 if loaded.tiled_attention else int(pages * KEPT_SHARE[on.type])
        logger.info(
            "%s: keys and values of %d tokens, and of %d kept for later requests, in %.0f MB, up to %d sequences",
            loaded.name, pages * PAGE_TOKENS, kept_pages * PAGE_TOKENS, (pages + kept_pages) * page_bytes / 1e6,
            max_sequences,
        )  # fmt: skip
        adapter_bytes = default_adapter_bytes(on) if adapter_bytes is None else adapter_bytes
        host_bytes = default_host_bytes() if host_bytes is None else host_bytes
        pool = None
        if BlockAttention.supports(on):  # whose kernels for mixtures read adapters at fixed addresses
            pool = pool_pages(loaded.groups, dtype=loaded.dtype, adapter_bytes=adapter_bytes)
            adapter_bytes = pool * pool_page_bytes(loaded.groups, loaded.dtype)
            logger.info("%s: a pool of %d pages of %d ranks for each module", loaded.name, pool, PAGE_ROWS)
        logger.info(
            "%s: room for %.0f MB of adapters on %s, for %.0f MB in host memory",
            loaded.name, adapter_bytes / 1e6, on, host_bytes / 1e6,
        )  # fmt: skip
        return cls(
            loaded,
            context=context,
            device=on,
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            pages=pages,
            kept_pages=kept_pages,
            pool_pages=pool,
            adapter_bytes=adapter_bytes,
            host_bytes=host_bytes,
            read=read,
        )

    @property
    def base_digest(self) -> str:
        return self._base.digest

    @property
    def tokenizer(self) -> Any:
        """The base's transformers tokenizer."""
        return self._base.tokenizer

    @property
    def context_tokens(self) -> int:
        """The longest prompt; a generated token sees at most this many tokens."""
        return min(self._base.context_tokens, self._pages.pages * PAGE_TOKENS)

    def add_adapter(self, name: str, adapter: str | Path | LoraAdapter, *, pinned: bool = False) -> str:
        """Load an adapter (or a folder in PEFT format) under a name; returns its digest.

        It is kept in host memory and brought to the device for the requests that need it; a ``pinned`` one stays there.
        One that came from a folder may leave host memory, too, and is read again: the folder has to stay as it is
        while the name means it.

        A name that is taken then means the new version; requests in flight finish on the one that they started with.
        Raises BaseMismatchError where it does not belong to this base, NotFoundError or AdapterFormatError for a folder
        that is missing or not understood, OverloadedError where there is no room for one that has to stay in memory.
        """
        return self._residency.add(name, adapter, pinned=pinned)

    def remove_adapter(self, name: str) -> None:
        """Forget a name (NotFoundError if there is none); requests in flight keep their weights until they end."""
        self._residency.remove(name)

    def adapters(self) -> dict[str, str]:
        """Name → digest of what is loaded."""
        return self._residency.adapters()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's token ids as :meth:`submit` takes them; raises what it raises for a prompt."""
        return encode(
            prompt,
            tokenizer=self._base.tokenizer,
            vocabulary=self._base.vocabulary,
            context_tokens=self.context_tokens,
        )

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        mix: Mapping[str, float] | TokenMix | None = None,
        sampling: SamplingParams | None = None,
        salt: str = "",
        tenant: str = "",
        weight: float = 1.0,
    ) -> Ticket:
        """Queue a request. A text is encoded with the end-of-text token before it, as documents were in training.

        What requests with the same ``salt``, mix and first tokens have computed is shared; a tenant's own salt keeps
        others from measuring what it has asked. Tenants share what is computed by their ``weight``, and one that uses
        less than its share is not slowed down much by others; ``tenant`` is a name of the caller's, of any meaning.

        Raises InvalidInputError for a prompt that is empty, longer than the context or holds unknown ids, or for a
        weight out of range, of an adapter or of the tenant, or for a mix that the device has no room for; NotFoundError
        for an adapter that is not loaded. The result raises UnavailableError where an adapter cannot be read again from
        its folder.
        """
        sampling = SamplingParams() if sampling is None else sampling
        if not isinstance(sampling, SamplingParams):
            raise InvalidInputError(f"found {sampling!r} as sampling, expected SamplingParams")
        if not isinstance(salt, str) or not is_text(salt):
            raise InvalidInputError(f"found {salt!r} as salt, expected a text")  # it would fail in the step, for all
        if not isinstance(tenant, str):
            raise InvalidInputError(f"found {tenant!r} as tenant, expected a text")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InvalidInputError(f"found the weight {weight!r} of tenant {tenant!r}, expected a number above 0")
        sampling.check_vocabulary(self._base.vocabulary)
        tokens = self.encode(prompt)
        request = Request(
            tokens,
            mix=self._residency.acquire(mix),
            sampling=sampling,
            max_new=min(sampling.max_tokens, self.context_tokens - len(tokens) + 1),
            decode=self._base.decode,
            salt=salt,
            tenant=tenant,
            weight=weight,
        )
        ticket = Ticket(advance=self._advance, cancel=self._cancel)
        with self._lock:
            self._tickets[request] = ticket
            if request.pending > 0:
                self._scheduler.add(request)
                self._wake()
        if request.pending == 0:  # one token to score, and no token before it
            self._finish(request, "length")
        return ticket

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        mixes: Sequence[Mapping[str, float] | TokenMix | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Run requests together and wait for all; results in the order of the prompts.

        ``mixes``: one for each prompt, None for the bare base. Where any of them is refused or fails, its error is
        raised and the others are cancelled.
        """
        if isinstance(prompts, str):
            raise InvalidInputError("found one text as prompts, expected a list of prompts")
        each_mix: list[Mapping[str, float] | TokenMix | None] = [None] * len(prompts) if mixes is None else list(mixes)
        each_sampling = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        for name, values in (("mixes", each_mix), ("sampling", each_sampling)):
            if len(values) != len(prompts):
                raise InvalidInputError(f"found {len(values)} {name} for {len(prompts)} prompts, expected one for each")
        tickets: list[Ticket] = []
        try:
            for prompt, mix, params in zip(prompts, each_mix, each_sampling, strict=True):
                tickets.append(self.submit(prompt, mix=mix, sampling=params))
            return [ticket.result() for ticket in tickets]
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise

    def start(self) -> None:
        """Run the stepping thread; does nothing where it runs already."""
        with self._lock:
            if self._thread is None:
                self._stopping = False
                self._thread = threading.Thread(target=self._run, name="lorafleet-engine", daemon=True)
                self._thread.start()
                self._work.notify_all()

    def stop(self) -> None:
        """End the threads after the step and the loads that run, and cancel every request that is not done."""
        with self._lock:
            thread, self._stopping = self._thread, True
            self._wake()
        if thread is not None:
            thread.join()
        with self._step_lock:
            with self._lock:
                self._thread = None
                left = self._scheduler.requests()
            for request in left:
                self._finish(request, "cancelled")
        self._residency.stop()
        self._adapters_changed()  # for those whose load was dropped before it began

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stats(self) -> EngineStats:
        tiers = self._residency.stats()
        with self._lock:
            return EngineStats(
                requests_running=self._scheduler.running,
                requests_waiting=self._scheduler.waiting,
                requests_finished_total=self._finished_total,
                requests_failed_total=self._failed_total,
                prompt_tokens_total=self._prompt_tokens_total,
                prefix_tokens_total=self._scheduler.prefix_tokens_total,
                preemptions_total=self._scheduler.preemptions_total,
                kv_pages=self._pages.pages,
                kv_pages_in_use=self._pages.in_use,
                generated_tokens_total=self._generated_tokens_total,
                steps_total=self._steps_total,
                adapter_packings_total=self._residency.packings_total,
                adapters_loaded=len(self._residency.adapters()),
                adapters_on_device=tiers.on_device,
                adapters_on_host=tiers.on_host,
                adapters_on_disk=tiers.on_disk,
                adapter_device_bytes=tiers.device_bytes,
                adapter_host_bytes=tiers.host_bytes,
                adapter_loads_total=tiers.loads_total,
                adapter_evictions_total=tiers.evictions_total,
                adapter_disk_reads_total=tiers.disk_reads_total,
            )

    def _cancel(self, ticket: Ticket) -> None:
        with self._lock:
            if not ticket.done:
                self._cancelled.add(ticket)
                self._wake()

    def _adapters_changed(self) -> None:
        with self._lock:
            self._wake()

    def _wake(self) -> None:
        self._stalled = False
        self._work.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(
                    lambda: (
                        self._stopping
                        or self._scheduler.running
                        or (self._scheduler.waiting and not self._stalled)
                        or self._cancelled
                    )
                )
                if self._stopping:
                    return
            with self._step_lock:
                try:
                    self._step()
                except Exception as error:  # outside any one request: a fault of the engine's own
                    logger.exception("a step failed; every request that was in the engine fails with it")
                    with self._lock:
                        left = self._scheduler.requests()
                    for request in left:
                        self._fail(request, error)

    def _advance(self, ready: Callable[[], bool], timeout_s: float | None) -> bool:
        if self._thread is not None:
            return False
        with self._step_lock:
            self._step()
        with self._lock:
            self._work.wait_for(lambda: not self._stalled or ready(), timeout_s)
        return True

    @torch.inference_mode()
    def _step(self) -> None:
        """One step of all that runs; requests that fail end with their error, the others go on."""
        gone: list[Request] = []
        with self._lock:
            if self._cancelled:
                gone = [request for request, ticket in self._tickets.items() if ticket in self._cancelled]
                self._cancelled.clear()
        for request in gone:
            self._finish(request, "cancelled")
        unloadable: dict[Request, Exception] = {}
        with self._lock:
            failed = self._residency.take_failed()
            for request in self._scheduler.waiting_for(failed) if failed else ():
                self._scheduler.remove(request)  # at once, lest its adapter be read again for it
                unloadable[request] = next(failed[digest] for digest in request.mix.held if digest in failed)
        for request, error in unloadable.items():
            self._fail(request, error)
        began = time.perf_counter()
        with self._lock:
            runs = self._scheduler.schedule()
            self._steps_total += bool(runs)
            now = time.monotonic()
            for run in runs:
                self._tickets[run.request].start(now)
            # A load that ends from here on wakes whoever waits; where none is under way there is nothing to wait for.
            self._stalled = not runs and self._scheduler.waiting > 0 and self._residency.loading
        if runs:
            self._compute(runs)
            with self._lock:
                self._scheduler.took(runs, time.perf_counter() - began)

    def _compute(self, runs: Sequence[ScheduledRun]) -> None:
        """Compute runs together; where that fails, one by one, so that only the request at fault fails."""
        try:
            outcomes = self._runner.run(runs)
        except Exception as error:
            if len(runs) == 1:
                logger.exception("a request failed")
                self._fail(runs[0].request, error)
            else:
                for run in runs:
                    self._compute([run])
            return
        with self._lock:
            for run, outcome in zip(runs, outcomes, strict=True):
                self._prompt_tokens_total += max(0, min(run.stop, run.request.prompt_tokens) - run.start)
                self._generated_tokens_total += outcome.token is not None
        for run, outcome in zip(runs, outcomes, strict=True):
            try:
                self._apply(run, outcome)
            except Exception as error:
                logger.exception("a request failed")
                self._fail(run.request, error)

    def _apply(self, run: ScheduledRun, outcome: Outcome) -> None:
        request = run.request
        if not outcome.finite:
            self._fail(request, InvalidInputError("the mix gives logits that are not finite; its adapters are damaged"))
            return
        request.computed = run.stop
        # From their place on: a request that gave up its memory scores its prompt once more.
        request.prompt_logprobs[run.start :] = outcome.prompt_logprobs or request.prompt_logprobs[run.start :]
        reason: FinishReason | None = None
        if outcome.token is not None:
            chunk, reason = request.accept(
                outcome.token, logprob=outcome.logprob, eos=self._base.eos, top_logprobs=outcome.top_logprobs
            )
            self._tickets[request].put(chunk)
        elif request.pending == 0:  # the prompt is scored, and no more was asked for
            reason = "length"
        # Also of what ends with its first token; but not what the last step of a scored prompt computed: routers score
        # each prompt with many mixes, and few are asked for again.
        if reason is None or outcome.token is not None:
            with self._lock:
                self._scheduler.computed(request)
        if reason is not None:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        ticket = self._forget(request)
        with self._lock:
            self._finished_total += 1
        ticket.finish(request.generation(reason))

    def _fail(self, request: Request, error: Exception) -> None:
        ticket = self._forget(request)
        with self._lock:
            self._failed_total += 1
        ticket.fail(error)

    @torch.inference_mode()  # the cache may hold tensors that were made in a step
    def _forget(self, request: Request) -> Ticket:
        with self._lock:
            self._scheduler.remove(request)
            ticket = self._tickets.pop(request)
        self._residency.release(request.mix)
        return ticket
