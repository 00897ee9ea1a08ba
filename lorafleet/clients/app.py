"""The Flower ClientApp: orders come as Messages, updates leave as replies.

Every Flower task is a process of its own. The module imports neither torch nor transformers, so that the query that
asks a node who it is costs a fraction of a second; training and evaluation import them when they are asked for.

A member's own settings come from its SuperNode's ``--node-config``: ``member`` (its registered key), ``data`` (what
:func:`lorafleet.clients.data.open_texts` takes), ``rank``, and optionally ``base``, ``device`` and ``dtype``. What is
given in code wins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lorafleet.clients.data import Texts, open_texts, split_texts
from lorafleet.errors import InvalidInputError, LorafleetError, UnavailableError

if TYPE_CHECKING:
    from lorafleet.clients.member import Member, Update

log = logging.getLogger(__name__)

T = TypeVar("T")

# The wire schema's name of this section; its module needs torch, and a query must not.
HEADER_SECTION = "header"
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class _Local:
    """Who this client is and what it has: from code, or from the node's config."""

    member: str
    rank: int
    data: str | Path | Texts
    base: str
    device: str
    dtype: str


def client_app(
    dataset: str | Path | Texts | None = None,
    *,
    member: str | None = None,
    rank: int | None = None,
    base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> ClientApp:
    """A ClientApp that trains on ``dataset``; what is not given here is read from the node's config."""
    app = ClientApp()

    def local(context: Context) -> _Local:
        config = context.node_config
        said = _Local(
            member=_setting("member", member, config.get("member"), str),
            rank=_setting("rank", rank, config.get("rank"), int),
            data=dataset if dataset is not None else _setting("data", None, config.get("data"), str),
            base=_setting("base", base, config.get("base", "tiny"), str),
            device=_setting("device", device, config.get("device", "cpu"), str),
            dtype=_setting("dtype", dtype, config.get("dtype", "bfloat16"), str),
        )
        if said.rank < 1:
            raise InvalidInputError(f"rank: found {said.rank}, expected at least 1")
        if said.dtype not in DTYPES:
            raise InvalidInputError(f"dtype: found {said.dtype!r}, expected one of {', '.join(DTYPES)}")
        return said

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Who this node is: member key, rank, and how many documents it can train on."""

        def answer() -> RecordDict:
            me = local(context)
            documents = len(split_texts(open_texts(me.data)).train)
            said = ConfigRecord({"member": me.member, "rank": me.rank, "num_examples": documents})
            return RecordDict({HEADER_SECTION: said})

        return Message(_discreetly(answer), reply_to=message)

    def work(message: Message, context: Context) -> Message:
        return Message(_discreetly(lambda: _carry_out(message, local(context))), reply_to=message)

    # An order without steps comes as an evaluation; the order itself says what to do.
    app.train()(work)
    app.evaluate()(work)
    return app


def _setting(name: str, given: T | None, configured: object, kind: type[T]) -> T:
    value = configured if given is None else given
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidInputError(
            f"{name}: found {value!r}, expected {kind.__name__}; give it in code or in the node's config ({name}=…)"
        )
    return value


def _discreetly(answer: Callable[[], RecordDict]) -> RecordDict:
    """Run it; Flower sends an error's text to the coordinator, so paths and data stay in this machine's log."""
    try:
        return answer()
    except Exception as error:
        log.exception("the order could not be carried out")
        kind = type(error).__name__ if isinstance(error, LorafleetError) else "an unexpected error"
        raise UnavailableError(f"the member could not do this: {kind}; its own log says more") from None


def _carry_out(message: Message, me: _Local) -> RecordDict:
    from lorafleet.adapters.wire import EXPERT_SECTION, ORDER_SECTION, TrainOrder, from_arrays
    from lorafleet.clients.member import carry_out

    config = message.content.config_records.get(ORDER_SECTION)
    if config is None:
        raise InvalidInputError(f"found no section {ORDER_SECTION!r} in the message; is the coordinator a lorafleet?")
    order = TrainOrder.from_config(config)
    arrays = message.content.array_records.get(EXPERT_SECTION)
    expert = None
    if arrays is not None:
        expert = from_arrays({key: array.numpy() for key, array in arrays.items()}, base=order.base_digest)
    return to_records(carry_out(_load(me), order, expert, on_step=_report))


def _load(me: _Local) -> Member:
    import torch
    from transformers import AutoTokenizer

    from lorafleet.assets import base_digest, base_path
    from lorafleet.clients.member import Member
    from lorafleet.clients.trainer import load_base

    folder = base_path(me.base)
    return Member(
        key=me.member,
        rank=me.rank,
        split=split_texts(open_texts(me.data)),
        model=load_base(folder, device=me.device, dtype=getattr(torch, me.dtype)),
        tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        base_digest=base_digest(folder),
    )


def _report(step: int, loss: float) -> None:
    log.info("step %d, loss %.4f", step, loss)


def to_records(update: Update) -> RecordDict:
    """The named sections of the wire schema as Flower's records."""
    from lorafleet.adapters.wire import FACTORS_SECTION, METRICS_SECTION, to_arrays

    records = RecordDict(
        {
            HEADER_SECTION: ConfigRecord(dict(update.header.to_config())),
            METRICS_SECTION: MetricRecord(dict(update.metrics)),
        }
    )
    if update.residual is not None:
        arrays = to_arrays(update.residual)
        records[FACTORS_SECTION] = ArrayRecord({key: Array(array) for key, array in arrays.items()})
    return records


app = client_app()
"""The app that a federation's coordinator names: everything about the member comes from its own node's config."""
