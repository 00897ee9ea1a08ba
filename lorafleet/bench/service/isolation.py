"""Many tenants, adapters that come and go, and every answer held against an isolated run of what answered it.

Callers of all tenants ask over both doors while each tenant's adapters are replaced under their names, moved, retired,
quarantined and deleted (:mod:`.churn`), and more of them are in use than the device tier holds. Every answer says by
digest what answered it; when all is over, an engine of its own computes the same prompt with those weights, alone
(:mod:`.reference`). All tenants ask the same prompts, so that whatever one's cache gave another would show.

A check of answers sees a wrong version only where versions answer differently: how many do is told, too.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafleet.adapters import LoraAdapter
from lorafleet.bench.service.asks import Ask, Outcome
from lorafleet.bench.service.churn import CANARY, Churn
from lorafleet.bench.service.figures import Verdict
from lorafleet.bench.service.harness import BASE, Service, Tenants, random_adapter
from lorafleet.bench.service.reference import Isolated, Wrong, first_wrong
from lorafleet.engine import Engine
from lorafleet.registry import Registry
from lorafleet.registry.records import CHAMPION

SCENARIO = "isolation"
NAMES = ("a", "b")
RANKS = (2, 4, 8)
SIZE = 0.5
"""Of the factors: so large that nearly every adapter gives other tokens than any other one."""
LEAST_TOLD_APART = 0.9
LEAST_COMPARED = 0.85
"""Of the calls for one's own: others are for what is not there yet, or not any more."""
PROMPTS = (
    "SELECT name, count(*) FROM orders WHERE ",
    "The sea was quiet that morning, and nobody in the village had heard ",
    "def add(self, value):\n    self.total += value\n    return ",
    "#include <vector>\n\ntemplate <typename T>\nstruct Node {\n    T value;\n",
    "In the beginning there was a long letter, which she read again and again until the light was gone and ",
    "INSERT INTO members (id, name, joined) VALUES (1, 'Ada', '2024-01-01'), (2, ",
    "for index, item in enumerate(items):\n    if item is None:\n        continue\n    result.append(",
    "He had been told that the house was empty; but when he came to the gate there were lights in all of its windows, "
    "and somebody was playing the piano, badly, and with great patience, over and over the same four bars of ",
)


@dataclass(frozen=True, kw_only=True)
class IsolationSettings:
    requests: int = 12_000
    """A tenth or more of which is for what is not there: some 10,000 answers are compared."""
    tenants: int = 50
    callers: int = 24
    """That wait for their answers, over all tenants."""
    changes_a_second: float = 8.0
    max_tokens: int = 8
    adapter_mb: int = 2
    """Of the device tier: some ten adapters."""
    seed: int = 1


class Planned(NamedTuple):
    """A call, and what may come of it."""

    ask: Ask
    kind: str
    may_be_missing: bool = False
    """It names a version that may not be there, or be out of use."""
    is_foreign: bool = False
    """It names another tenant's, which must not be found."""


class Judged(NamedTuple):
    """What became of the calls."""

    right: int
    wrong: list[tuple[Planned, Wrong]]
    missing: int
    """Answered as what is not there, as they may be."""
    refused: int
    """Foreign ones that were not found, as they must be."""
    failed: Counter[str]
    """Any other status → how many."""


def plan(settings: IsolationSettings, keys: Mapping[str, str]) -> list[Planned]:
    """Calls of all tenants, drawn by seed; ``keys``: tenant → key."""
    rng = random.Random(f"{settings.seed}/asks")
    tenants = list(keys)
    planned = []
    for _ in range(settings.requests):
        tenant = rng.choice(tenants)
        other = rng.choice([each for each in tenants if each != tenant])
        name, second = rng.sample(NAMES, 2)
        own = f"{tenant}/{name}"
        number = rng.randint(2, 6)
        kind, model, mix, missing, foreign = rng.choices(
            [
                ("name", own, {}, False, False),
                ("alias", f"{own}@{CANARY}", {}, False, False),
                ("first version", f"{own}:1", {}, False, False),
                ("version", f"{own}:{number}", {}, True, False),
                ("mix", "", {own: 0.75, f"{tenant}/{second}@{CANARY}": 0.5}, False, False),
                ("base", "base", {}, False, False),
                ("auto", "auto", {}, False, False),
                ("foreign", f"{other}/{name}", {}, False, True),
            ],
            weights=[40, 15, 10, 10, 10, 5, 5, 5],
        )[0]
        ask = Ask(
            key=keys[tenant],
            prompt=rng.choice(PROMPTS),
            door="completion" if rng.random() < 0.2 else "generate",
            model=model,
            mix=mix,
            max_tokens=settings.max_tokens,
        )
        planned.append(Planned(ask, kind, missing, foreign))
    return planned


def judge(planned: Sequence[Planned], outcomes: Sequence[Outcome | None], isolated: Isolated) -> Judged:
    """Hold every answer against an isolated run of its prompt with the mix that it says answered it."""
    found = Judged(0, [], 0, 0, Counter())
    right = missing = refused = 0
    for each, outcome in zip(planned, outcomes, strict=True):
        if outcome is None:
            found.failed["not sent"] += 1
        elif outcome.status == "NOT_FOUND" and each.is_foreign:
            refused += 1
        elif outcome.status == "NOT_FOUND" and each.may_be_missing:
            missing += 1
        elif outcome.status != "OK":
            found.failed[outcome.status] += 1
        elif each.is_foreign:
            found.failed["answered another tenant"] += 1
        elif len(outcome.answer) != each.ask.max_tokens:
            found.failed["another number of tokens"] += 1
        else:
            go = isolated.go(outcome.digests)
            wrong = first_wrong(go, isolated.encode(each.ask.prompt), outcome.answer, text=isolated.text)
            if wrong is None:
                right += 1
            else:
                found.wrong.append((each, wrong))
    return found._replace(right=right, missing=missing, refused=refused)


def told_apart(
    planned: Sequence[Planned], outcomes: Sequence[Outcome | None], isolated: Isolated, *, places: int
) -> float:
    """Of the versions that answered for one name and prompt, the share whose answer no other of them gives.

    1 where every version would have been told from any other; NaN where no name answered with two versions.
    """
    answered: dict[tuple[str, str], set[str]] = {}
    for each, outcome in zip(planned, outcomes, strict=True):
        if outcome is not None and outcome.status == "OK" and len(outcome.digests) == 1 and each.kind != "auto":
            (digest,) = outcome.digests
            answered.setdefault((each.ask.model.partition("@")[0].partition(":")[0], each.ask.prompt), set()).add(
                digest
            )
    alone = several = 0
    for (_, prompt), digests in answered.items():
        if len(digests) > 1:
            ids = isolated.encode(prompt)
            given = Counter(tuple(isolated.tokens(ids, {digest: 1.0}, places)) for digest in digests)
            several += len(digests)
            alone += sum(1 for count in given.values() if count == 1)
    return alone / several if several else float("nan")


def bench_isolation(
    settings: IsolationSettings,
    *,
    work: Path,
    registry_url: str,
    threads: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Verdict]]:
    """Figures of the record, and what they come to."""
    weights: dict[str, LoraAdapter] = {}
    rng = random.Random(f"{settings.seed}/weights")

    def make() -> LoraAdapter:
        made = random_adapter(rng.getrandbits(60), rank=rng.choice(RANKS), size=SIZE)
        weights[made.digest] = made
        return made

    with Registry.open(registry_url, work / "blobs") as registry:
        say(f"{settings.tenants} tenants with {len(NAMES)} adapters each")
        tenants = Tenants(registry)
        for number in range(settings.tenants):
            tenant = f"tenant-{number:03}"
            tenants.add(tenant)
            for name in NAMES:
                tenants.add_adapter(tenant, name, make())
                for alias in (CHAMPION, CANARY):
                    registry.set_alias(tenant, name, alias, 1)
        planned = plan(settings, tenants.keys)
        adapters = [(tenant, name) for tenant in tenants.keys for name in NAMES]
        churn = Churn(
            registry, adapters, make, a_second=settings.changes_a_second, rng=random.Random(f"{settings.seed}/churn")
        )
        arguments = ["--dtype", "float32", "--threads", str(threads), "--adapter-mb", str(settings.adapter_mb)]
        with Service.of(work, registry=registry_url, blobs=work / "blobs", arguments=arguments) as service:
            say(f"{settings.requests} requests")
            started = service.start([each.ask for each in planned], callers=settings.callers, keep_answers=True)
            outcomes = started.outcomes(meanwhile=churn.turn)
    say("isolated runs")
    with Engine.load(BASE, dtype="float32", max_sequences=1, max_batch_tokens=512) as engine:
        isolated = Isolated(engine, weights.__getitem__)
        judged = judge(planned, outcomes, isolated)
        apart = told_apart(planned, outcomes, isolated, places=settings.max_tokens)
    used = {digest for outcome in outcomes if outcome is not None for digest in outcome.digests}
    took_s = max((outcome.ended_s for outcome in outcomes if outcome is not None), default=0.0)
    record = {
        "kinds": dict(Counter(each.kind for each in planned)),
        "answers": judged.right + len(judged.wrong),
        "right": judged.right,
        "wrong": [
            {"kind": each.kind, "door": each.ask.door, "model": each.ask.model, **wrong._asdict()}
            for each, wrong in judged.wrong[:20]
        ],
        "not_there": judged.missing,
        "foreign_refused": judged.refused,
        "failed": dict(judged.failed),
        "changes": dict(churn.done),
        "deleted": churn.deleted,
        "digests_used": len(used),
        "told_apart": apart,
        "seconds": took_s,
    }
    return record, verdicts(judged, apart, churn.deleted, planned)


def verdicts(judged: Judged, apart: float, deleted: int, planned: Sequence[Planned]) -> list[Verdict]:
    foreign = sum(each.is_foreign for each in planned)
    wrong, failed = len(judged.wrong), sum(judged.failed.values())
    least = math.ceil(LEAST_COMPARED * (len(planned) - foreign))
    return [
        Verdict(SCENARIO, "answers that differ from an isolated run", wrong, "none", wrong == 0),
        Verdict(SCENARIO, "answers that were compared", judged.right + wrong, f"at least {least}",
                judged.right + wrong >= least),
        Verdict(SCENARIO, "calls that failed", failed, "none", failed == 0),
        Verdict(SCENARIO, "calls for another tenant's that were refused", judged.refused, f"all {foreign}",
                judged.refused == foreign),
        Verdict(SCENARIO, "versions that were deleted meanwhile", deleted, "at least one", deleted > 0),
        Verdict(SCENARIO, "versions of a name whose answers tell them apart", apart, f"at least {LEAST_TOLD_APART:g}",
                apart >= LEAST_TOLD_APART),
    ]  # fmt: skip
