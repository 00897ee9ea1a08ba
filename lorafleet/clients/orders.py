"""What a loaded member answers to the messages of a federation: the wire schema on either side of ``carry_out``."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lorafleet.adapters.wire import (
    EXPERT_SECTION,
    FACTORS_SECTION,
    HEADER_SECTION,
    METRICS_SECTION,
    ORDER_SECTION,
    TrainOrder,
    from_arrays,
    to_arrays,
)
from lorafleet.assets import base_digest, base_path
from lorafleet.clients.data import Split, fills_block
from lorafleet.clients.handover import Sections
from lorafleet.clients.member import Member, Update, carry_out
from lorafleet.clients.trainer import TrainSettings, load_base
from lorafleet.errors import InvalidInputError, UnavailableError

log = logging.getLogger(__name__)


def load_member(key: str, *, rank: int, split: Split, base: str | Path, device: str, dtype: str) -> Member:
    """A member with its base on ``device``; raises NotFoundError where there is no base.

    Warns where a part of its texts is too short for an order of the usual sequence length.
    """
    folder = base_path(base)
    with _bars_on_terminals_alone():
        model = load_base(folder, device=device, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for part, texts in (("training", split.train), ("held-out", split.held_out)):
        if not fills_block(texts, tokenizer, TrainSettings.sequence_length):
            log.warning(
                "the %s part of your texts has at most %d tokens: an order of sequences that long will fail, add texts",
                part, TrainSettings.sequence_length,
            )  # fmt: skip
    return Member(key=key, rank=rank, split=split, model=model, tokenizer=tokenizer, base_digest=base_digest(folder))


@contextlib.contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    """Without a terminal, a progress bar of transformers is noise in a log file; afterwards it is as it was."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def answer(
    member: Member,
    asked: Sections,
    *,
    check: Callable[[], None] = lambda: None,
    received_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sections:
    """Carry out the order in ``asked``. ``check`` runs at every step and held-out batch; what it raises ends the work.

    The order came at ``received_s`` by the clock, or just now. Raises UnavailableError once its deadline has passed,
    InvalidInputError or BaseMismatchError for an order that is none, or not this member's.
    """
    received = clock() if received_s is None else received_s
    config = asked.configs.get(ORDER_SECTION)
    if config is None:
        raise InvalidInputError(f"found no section {ORDER_SECTION!r} in the message; is the coordinator a lorafleet?")
    order = TrainOrder.from_config(config)
    arrays = asked.arrays.get(EXPERT_SECTION)
    expert = None if arrays is None else from_arrays(arrays, base=order.base_digest)

    def on_step(step: int, loss: float) -> None:
        log.debug("round %d, step %d of %d: loss %.4f", order.round, step, order.steps, loss)

    def check_all() -> None:
        check()
        if clock() - received > order.deadline_s:
            raise UnavailableError(f"the order's deadline of {order.deadline_s:g} s has passed: it is dropped")

    log.info("round %d of %s: %d steps", order.round, order.federation, order.steps)
    update = carry_out(member, order, expert, on_step=on_step, check=check_all)
    log.info("round %d of %s: %s", order.round, order.federation, _summary(update))
    return to_sections(update)


def _summary(update: Update) -> str:
    metrics = update.metrics
    held = f"held-out loss of the expert that came {metrics['held_out_loss']:.3f}"
    if update.residual is None:
        return held
    trained = f"rank {update.header.rank}, training loss {metrics['train_loss']:.3f}"
    return f"{held}; {trained}, {metrics['train_seconds']:.1f} s"


def to_sections(update: Update) -> Sections:
    """The named sections of the wire schema."""
    arrays = {} if update.residual is None else {FACTORS_SECTION: to_arrays(update.residual)}
    return Sections({HEADER_SECTION: update.header.to_config()}, {METRICS_SECTION: update.metrics}, arrays)
