"""Does the time of a first token tell what another tenant has asked?

For each probe a victim asks a new text, or another one of the same kind, by the toss of a coin; then somebody asks the
text and takes the time of the first token. Sooner is taken for "it was asked before": the area under the ROC of that is
1/2 where the time tells nothing. A control, in which victim and prober are one tenant and do share a cache, has to see
its hits: without it a blind probe would pass.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.bench.service.asks import Ask, Outcome
from lorafleet.bench.service.figures import Area, Verdict, quantile, roc_area
from lorafleet.bench.service.harness import Service, Tenants
from lorafleet.errors import UnavailableError
from lorafleet.registry import Registry

SCENARIO = "timing"
MOST_OFF = 0.05
LEAST_CONTROL = 0.9


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    probes: int = 1000
    control_probes: int = 300
    words: int = 90
    """Of a text: some 430 tokens, whose prefill is most of the time to a first token."""
    seed: int = 1


def plan(settings: TimingSettings, *, probes: int, victim: str, prober: str, rng: random.Random) -> list[Ask]:
    """Two calls for each probe: the victim's, and the probe; the keys are theirs. The coin is in :func:`was_asked`."""
    asks: list[Ask] = []
    for _ in range(probes):
        probed, other = (_text(settings.words, rng) for _ in range(2))
        asked = probed if rng.random() < 0.5 else other
        asks += [Ask(key=victim, prompt=asked, max_tokens=4), Ask(key=prober, prompt=probed, max_tokens=1)]
    return asks


def was_asked(asks: Sequence[Ask]) -> list[bool]:
    """For each probe, whether the victim had asked its text."""
    return [asks[i].prompt == asks[i + 1].prompt for i in range(0, len(asks), 2)]


def area(asks: Sequence[Ask], outcomes: Sequence[Outcome | None]) -> Area:
    """Of telling, by the time to the first token, what was asked before."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for hit, outcome in zip(was_asked(asks), outcomes[1::2], strict=True):
        if outcome is None or outcome.first_token_s is None:
            status = "not sent" if outcome is None else f"{outcome.status} {outcome.message}"
            raise UnavailableError(f"a probe had no first token ({status}), expected one of each")
        times[hit].append(-outcome.first_token_s)
    return roc_area(times[True], times[False])


def bench_timing(
    settings: TimingSettings, *, work: Path, registry_url: str, threads: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Verdict]]:
    """Figures of the record, and what they come to."""
    with Registry.open(registry_url, work / "blobs") as registry:
        tenants = Tenants(registry)
        victim, prober = tenants.add("victim"), tenants.add("prober")
    rng = random.Random(f"{settings.seed}/texts")
    record: dict[str, Any] = {}
    areas = []
    with Service.of(
        work, registry=registry_url, blobs=work / "blobs", arguments=["--threads", str(threads)]
    ) as service:
        runs = (("control", victim, settings.control_probes), ("another_tenant", prober, settings.probes))
        for name, key, probes in runs:
            say(f"{probes} probes: {name.replace('_', ' ')}")
            asks = plan(settings, probes=probes, victim=victim, prober=key, rng=rng)
            outcomes = service.start(asks, callers=1).outcomes()
            found = area(asks, outcomes)
            areas.append(found)
            first = [outcome.first_token_s or 0.0 for outcome in outcomes[1::2] if outcome is not None]
            hits = [t for t, hit in zip(first, was_asked(asks), strict=True) if hit]
            misses = [t for t, hit in zip(first, was_asked(asks), strict=True) if not hit]
            record[name] = {
                "probes": probes,
                "asked_before": len(hits),
                **found._asdict(),
                "median_first_token_s": {"asked": quantile(hits, 0.5), "not_asked": quantile(misses, 0.5)},
            }
    return record, verdicts(*areas)


def verdicts(control: Area, found: Area) -> list[Verdict]:
    off = abs(found.area - 0.5)
    return [
        Verdict(SCENARIO, "ROC-AUC, another tenant's prompts", found.area, f"0.5 ± {MOST_OFF:g}", off <= MOST_OFF),
        Verdict(SCENARIO, "ROC-AUC, one's own (control)", control.area, f"at least {LEAST_CONTROL:g}",
                control.area >= LEAST_CONTROL),
    ]  # fmt: skip


def _text(words: int, rng: random.Random) -> str:
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(words))
