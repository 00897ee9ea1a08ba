"""Does the time of a refusal tell what another tenant has?

For each probe somebody asks for what it may not use, over one of the doors: by the toss of a coin something that is
there, or a name that nobody has. Later is taken for "it is there": the area under the ROC of that is 1/2 where the
time tells nothing. What is there is an adapter of a tenant that the prober has nothing to do with (``foreign``), or a
version that a federation made after the prober's last member there was revoked (``left``). A control asks for what the
prober does see, an adapter for another base, which is looked up before it is refused: without it a blind probe would
pass.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafleet.bench.service.asks import Ask, Door, Outcome
from lorafleet.bench.service.figures import Area, Verdict, quantile, roc_area
from lorafleet.bench.service.harness import Service, Tenants, random_adapter
from lorafleet.errors import UnavailableError
from lorafleet.registry import NewExpert, Registry

SCENARIO = "names"
MOST_OFF = 0.05
LEAST_CONTROL = 0.7
"""One look-up more, some 2 ms of 8, gave 0.78 and 0.80 with other programs on both cores."""
DOORS: tuple[Door, ...] = ("generate", "completion")
_OF_ANOTHER_BASE: dict[Door, str] = {"generate": "FAILED_PRECONDITION", "completion": "INVALID_ARGUMENT"}
"""What the control's names are refused as: over HTTP it is a 400."""
_OTHER_BASE = "sha256:" + "0" * 64
_EACH = 8
"""Names that are there, of each kind, and as many that are not."""


@dataclass(frozen=True, kw_only=True)
class NameSettings:
    probes: int = 1000
    """Of each kind, over each door."""
    control_probes: int = 300
    seed: int = 1


class Names(NamedTuple):
    """References of one kind, as long as one another."""

    there: tuple[str, ...]
    missing: tuple[str, ...]


def plan(names: Names, *, probes: int, key: str, door: Door, rng: random.Random) -> tuple[list[Ask], list[bool]]:
    """The asks, and for each whether what it names is there."""
    tosses = [rng.random() < 0.5 for _ in range(probes)]
    chosen = [rng.choice(names.there if there else names.missing) for there in tosses]
    return [Ask(key=key, prompt="x", door=door, model=name, max_tokens=1) for name in chosen], tosses


def times(
    outcomes: Sequence[Outcome | None], tosses: Sequence[bool], *, refused_as: str
) -> tuple[list[float], list[float]]:
    """Seconds until what is there was refused, and what is missing; UnavailableError where that was not the answer."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for outcome, there in zip(outcomes, tosses, strict=True):
        wanted = refused_as if there else "NOT_FOUND"
        if outcome is None or outcome.status != wanted:
            status = "not sent" if outcome is None else f"{outcome.status} {outcome.message}"
            raise UnavailableError(f"a probe was answered {status!r}, expected {wanted}")
        found[there].append(outcome.ended_s - outcome.sent_s)
    return found[True], found[False]


def bench_names(
    settings: NameSettings, *, work: Path, registry_url: str, threads: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Verdict]]:
    """Figures of the record, and what they come to."""
    with Registry.open(registry_url, work / "blobs") as registry:
        key, kinds = _fill(Tenants(registry), random.Random(f"{settings.seed}/names"))
    rng = random.Random(f"{settings.seed}/tosses")
    record: dict[str, Any] = {}
    found: list[Verdict] = []
    with Service.of(
        work, registry=registry_url, blobs=work / "blobs", arguments=["--threads", str(threads)]
    ) as service:
        for door in DOORS:
            for kind, names in kinds.items():
                is_control = kind == "control"
                probes = settings.control_probes if is_control else settings.probes
                say(f"{probes} probes over {door}: {kind}")
                asks, tosses = plan(names, probes=probes, key=key, door=door, rng=rng)
                outcomes = service.start(asks, callers=1).outcomes()
                refused_as = _OF_ANOTHER_BASE[door] if is_control else "NOT_FOUND"
                there, missing = times(outcomes, tosses, refused_as=refused_as)
                area = roc_area(there, missing)
                record[f"{door}/{kind}"] = {
                    "probes": probes,
                    "there": len(there),
                    **area._asdict(),
                    "median_s": {"there": quantile(there, 0.5), "missing": quantile(missing, 0.5)},
                }
                found.append(verdict(door, kind, area))
    return record, found


def verdict(door: Door, kind: str, area: Area) -> Verdict:
    what = f"ROC-AUC, {kind} names, {door}"
    if kind == "control":
        return Verdict(SCENARIO, what, area.area, f"at least {LEAST_CONTROL:g}", area.area >= LEAST_CONTROL)
    return Verdict(SCENARIO, what, area.area, f"0.5 ± {MOST_OFF:g}", abs(area.area - 0.5) <= MOST_OFF)


def _fill(tenants: Tenants, rng: random.Random) -> tuple[str, dict[str, Names]]:
    """The prober's key, and by kind what there is for it to ask for."""
    registry, weights = tenants.registry, random_adapter(0, rank=1, targets=("q_proj",))
    tenants.add("victim")
    key = tenants.add("prober")
    foreign, control = (_names(rng) for _ in range(2))
    registry.register_base("other", _OTHER_BASE, architecture="LlamaForCausalLM", parameters=1)
    for name in foreign.there:
        tenants.add_adapter("victim", name, weights)
    for name in control.there:
        registry.create_adapter("victim", name, base="other")
        registry.add_version("victim", name, weights)
        registry.grant("victim", name, to="prober")
    federation = registry.create_federation("victim", "fed", base=tenants.base, settings={})
    registry.add_member(federation, "once", tenant="prober")
    for number in range(1, 11 + _EACH):
        if number == 11:  # from here on numbers have two digits, as those have that are missing
            registry.revoke_member(federation, "once")
        opened = registry.open_round(federation, number)
        registry.commit_round(opened, [NewExpert("shared", weights, "exact")], report={})
    later = [f"victim/shared:{number}" for number in range(11, 11 + 2 * _EACH)]
    return key, {
        "control": Names(*(tuple(f"victim/{name}:1" for name in half) for half in control)),
        "foreign": Names(*(tuple(f"victim/{name}:1" for name in half) for half in foreign)),
        "left": Names(tuple(later[:_EACH]), tuple(later[_EACH:])),
    }


def _names(rng: random.Random) -> Names:
    made = ["".join(rng.choices(string.ascii_lowercase, k=10)) for _ in range(2 * _EACH)]
    return Names(tuple(made[:_EACH]), tuple(made[_EACH:]))
