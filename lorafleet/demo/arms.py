"""The arms that the federated experts are compared with, trained in worker processes beside the federation.

``local``: the main owner of each domain alone, as many steps as it has in the federation. ``centralised``: one adapter
on everybody's data, as many steps as everybody together. ``fedit``: the same federation under another rule; it shares
the first round's updates, which are the same work, and differs from there on. All are imported into the registry under
the operator, so that the same service answers with them.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lorafleet.adapters import LoraAdapter, wire
from lorafleet.adapters.base_shapes import base_shapes
from lorafleet.adapters.wire import TrainOrder
from lorafleet.assets import base_digest, base_path
from lorafleet.coordinator.parts import Parts
from lorafleet.coordinator.rounds import run_federation
from lorafleet.coordinator.transport import MemberInfo, Order, Reply
from lorafleet.coordinator.tree import LocalReducer
from lorafleet.demo.corpora import Corpora, Owner
from lorafleet.demo.members import InProcessMembers
from lorafleet.demo.settings import TENANT, DemoSettings
from lorafleet.registry import Federation, Registry, Version

Arrays = dict[str, wire.FloatArray]
T = TypeVar("T")


class Arms:
    """Worker processes and what they are asked to train; leaving the block ends them."""

    def __init__(self, settings: DemoSettings, corpora: Corpora, folder: Path, *, workers: int) -> None:
        self._settings, self._corpora, self._folder = settings, corpora, folder
        self._workers = workers
        self._beside: ProcessPoolExecutor | None = None
        self._pool: ProcessPoolExecutor | None = None
        self._alone: dict[str, Future[Arrays]] = {}

    def __enter__(self) -> Self:
        # Spawned, not forked: this process has threads of Ray and gRPC.
        context = multiprocessing.get_context("spawn")
        # One beside the federation, whose members keep the cores busy: another would add 450 MB to the demo's peak.
        self._beside = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker)
        self._pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_start_worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._beside, self._pool):
            assert pool is not None
            workers = list((pool._processes or {}).values())
            pool.shutdown(wait=error is None, cancel_futures=True)
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
                worker.join()

    def start_alone(self) -> None:
        """Begin with what needs nothing from the federation, beside it."""
        assert self._beside is not None
        training, settings = self._settings.training, self._settings
        steps = training.steps * settings.rounds
        owners = list(zip(self._corpora.owners, settings.ranks, strict=True))
        everybody = [owner.folder for owner in self._corpora.owners]
        self._alone["centralised"] = self._beside.submit(
            _train_alone, settings, everybody, max(settings.ranks), steps * len(owners)
        )
        for domain in self._corpora.domains:
            main = main_owner(self._corpora, domain.name)
            rank = next(rank for owner, rank in owners if owner.name == main.name)
            self._alone[f"local-{domain.name}"] = self._beside.submit(
                _train_alone, settings, [main.folder], rank, steps
            )

    def finish(self, registry: Registry, federation: Federation, check: Callable[[], None]) -> dict[str, list[Version]]:
        """Train what is left and import everything: arm (``local-sql``, ``fedit-expert-1``) → its versions by round."""
        done: dict[str, list[LoraAdapter]] = self._fedit(registry, federation, check)
        for name, arrays in zip(self._alone, gather(list(self._alone.values()), check), strict=True):
            done[name] = [wire.from_arrays(arrays)]
        return {
            name: import_arm(registry, federation, f"arm-{name}", adapters) for name, adapters in sorted(done.items())
        }

    def _fedit(
        self, registry: Registry, federation: Federation, check: Callable[[], None]
    ) -> dict[str, list[LoraAdapter]]:
        settings = self._settings.federation("fedit")
        members = {
            owner.name: MemberInfo(owner.name, rank, 1)
            for owner, rank in zip(self._corpora.owners, self._settings.ranks, strict=True)
        }
        transport = InProcessMembers(
            members, lambda orders: self._carry_out(orders, check), first_round(registry, federation)
        )
        url = f"sqlite:///{self._folder.resolve() / 'fedit.db'}"
        with Registry.open(url, self._folder / "blobs") as own:
            base = registry.base(federation.base_digest)
            own.register_base(base.name, base.digest, architecture=base.architecture, parameters=base.parameters)
            for name in (TENANT, *members):
                own.create_tenant(name)
            twin = own.create_federation(TENANT, settings.name, base=base.digest, settings=settings.to_dict())
            for name in members:
                own.add_member(twin, name, tenant=name)
            # The same clusters in every round: the arms differ in the rule only.
            groups = {r.number: r.report["assignment"] for r in registry.rounds(federation)}
            parts = Parts(
                own,
                transport,
                LocalReducer(),
                base.digest,
                base_shapes(base_path(settings.base)),
                groups=groups.__getitem__,
            )
            run_federation(settings, twin, parts)
            return {
                f"fedit-{adapter.name.removeprefix(f'{settings.name}-')}": [
                    own.load(version) for version in own.versions(TENANT, adapter.name)
                ]
                for adapter in own.adapters(TENANT)
            }

    def _carry_out(self, orders: Mapping[str, Order], check: Callable[[], None]) -> dict[str, Reply]:
        assert self._pool is not None
        owners = {
            owner.name: (owner, rank) for owner, rank in zip(self._corpora.owners, self._settings.ranks, strict=True)
        }
        jobs = {}
        for member, (order, expert, _) in orders.items():
            owner, rank = owners[member]
            arrays = None if expert is None else wire.to_arrays(expert)
            jobs[member] = self._pool.submit(_carry_out, self._settings.base, owner.folder, member, rank, order, arrays)
        return dict(zip(jobs, gather(list(jobs.values()), check), strict=True))


def main_owner(corpora: Corpora, domain: str) -> Owner:
    """The owner with the most training text among those whose main domain it is."""
    return max((o for o in corpora.owners if o.domain == domain), key=lambda owner: owner.train_bytes)


def first_round(registry: Registry, federation: Federation) -> dict[tuple[int, str], Reply]:
    """The journal's updates of round 1 as replies: orders, seeds and work are the same under every rule."""
    first = registry.rounds(federation)[0]
    replies = {}
    for record in registry.updates(first):
        factors = registry.update_factors(record)
        header = wire.UpdateHeader(
            federation=federation.name, round=1, attempt=record.attempt, member=record.member,
            base_digest=federation.base_digest, expert_digest="", digest=record.digest, rank=record.rank,
            num_examples=record.num_examples,
        )  # fmt: skip
        replies[1, record.member] = Reply(record.member, header.to_config(), wire.to_arrays(factors), record.metrics)
    return replies


def import_arm(registry: Registry, federation: Federation, name: str, adapters: Sequence[LoraAdapter]) -> list[Version]:
    registry.create_adapter(TENANT, name, base=federation.base_digest)
    return [registry.add_version(TENANT, name, LoraAdapter(adapter.modules)) for adapter in adapters]


def gather(futures: Sequence[Future[T]], check: Callable[[], None]) -> list[T]:
    """Results in order; ``check`` is called about every second and may raise."""
    pending = set(futures)
    while pending:
        _, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
        check()
    return [future.result() for future in futures]


def _end_with_parent() -> None:
    """A worker that waits for its next task would never hear that the demo was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker() -> None:
    """In a worker: one core, and only what the federation and the service leave of it."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the demo ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(5)
    torch.set_num_threads(1)


@functools.lru_cache(maxsize=1)
def _base(name: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, digest), loaded once a worker."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from lorafleet.clients.machine import as_dtype
    from lorafleet.clients.trainer import load_base

    disable_progress_bar()  # a worker's stderr is the demo's own
    folder = base_path(name)
    dtype = as_dtype("auto", torch.device("cpu"))  # the members'
    return load_base(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder), base_digest(folder)


def _train_alone(settings: DemoSettings, folders: Sequence[Path], rank: int, steps: int) -> Arrays:
    """One adapter from the base on the training parts of some owners; without federation, in one go."""
    import torch

    from lorafleet.clients.data import open_texts, split_texts
    from lorafleet.clients.memory import give_back
    from lorafleet.clients.packing import pack
    from lorafleet.clients.trainer import TrainSettings, train_residual

    model, tokenizer, _ = _base(settings.base)
    training = settings.training
    blocks = [pack(split_texts(open_texts(folder)).train, tokenizer, training.sequence_length) for folder in folders]
    chosen = TrainSettings(
        rank=rank,
        steps=steps,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        learning_rate=training.learning_rate,
        seed=settings.seed,
        init_seed=settings.seed,
    )
    arrays = wire.to_arrays(train_residual(model, torch.cat(blocks), chosen).residual)
    give_back("cpu")
    return arrays


def _carry_out(base: str, folder: Path, member: str, rank: int, order: TrainOrder, expert: Arrays | None) -> Reply:
    """What the member's ClientApp does with the order, in this worker."""
    from lorafleet.clients.data import open_texts, split_texts
    from lorafleet.clients.member import Member, carry_out
    from lorafleet.clients.memory import give_back

    model, tokenizer, digest = _base(base)
    me = Member(member, rank, split_texts(open_texts(folder)), model, tokenizer, digest)
    update = carry_out(me, order, None if expert is None else wire.from_arrays(expert, base=digest))
    assert update.residual is not None
    reply = Reply(member, update.header.to_config(), wire.to_arrays(update.residual), update.metrics)
    give_back("cpu")
    return reply
