"""How long raw updates are kept: after a commit, factors that nothing will be computed with any more are deleted.

What a round counted is in its experts, and what is still to be counted stays. Where a round compares members by their
last words (:mod:`lorafleet.coordinator.commit`), these stay, too, however old they are. The journal says for good that
an update was there, whose it was, and what it weighed.
"""

from __future__ import annotations

import logging

from lorafleet.coordinator.commit import latest
from lorafleet.coordinator.parts import Parts
from lorafleet.coordinator.settings import FederationSettings
from lorafleet.errors import LorafleetError
from lorafleet.registry import Federation

log = logging.getLogger(__name__)


def drop_old_updates(
    settings: FederationSettings, federation: Federation, parts: Parts, number: int, *, spans_rounds: bool
) -> None:
    """Delete the factors of what counted so many rounds before the round that was committed last, ``number``, or more.

    In rounds apart that is also what was accepted in such a round and did not count. Where it fails the round stays as
    it is, and the next commit tries again.
    """
    through = number - settings.keep_updates
    if not settings.keep_updates or through < 1:
        return
    last_words = [record.key for record in latest(parts.registry.journal(federation))] if spans_rounds else []
    try:
        parts.registry.drop_factors(
            federation, through=through, uncounted=not spans_rounds, keep=last_words, token=parts.token
        )
    except LorafleetError as error:
        log.warning("updates of rounds up to %d are deleted later: %s", through, error)
