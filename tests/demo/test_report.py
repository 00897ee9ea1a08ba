"""Targets, tables and the page, from the figures of a run."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafleet.demo import report

GOOD = {"base": 3.0, "local": 2.6, "fedit": 2.6, "federated": 2.4, "centralised": 2.35, "routed": 2.41, "oracle": 2.4}


ROUND = {
    "round": 1,
    "seconds": 20.0,
    "reduce_s": 0.5,
    "bytes_up": 10_000,
    "bytes_down": 0,
    "truncation_error": {"mean": 0.01, "max": 0.02},
    "members": {"expert-1": 2, "shared": 4},
    "assignment": {},
}
OWNER = {
    "name": "alder",
    "domain": "cpp",
    "rank": 4,
    "train_bytes": 1000,
    "shares": {"cpp": 1.0},
    "expert": "expert-1",
}
SERVING = {
    "requests": 10,
    "errors": 0,
    "tenants": 2,
    "distinct_mixes": 5,
    "tokens_per_second": 500.0,
    "swaps_while_serving": 1,
    "experts": 4,
    "experts_in_last_version": 4,
}


def figures(**changes: float) -> dict[str, Any]:
    """What a run finds; ``changes`` go into every domain."""
    row = GOOD | changes
    expert = "operator/fleet-expert-1"
    return {
        "domains": {"cpp": dict(row), "sql": dict(row)},
        "curves": {d: {"federated": [3.0, 2.6, 2.4], "fedit": [3.0, 2.8, 2.6]} for d in ("cpp", "sql")},
        "router": {"cpp": {expert: 0.9, "base": 0.1}, "sql": {expert: 0.2, "base": 0.8}},
        "aggregation": {"relative_error": 1e-7, "truncation_error": 0.01},
        "rounds": [ROUND],
        "owners": [OWNER],
        "serving": dict(SERVING),
        "traffic": {"versions": [[0.5, expert, 1], [3.0, expert, 2]], "tokens": [[0.5, 32]]},
        "environment": {"python": "3.11", "machine": "<x86>"},
        "peak_memory_bytes": 4_000_000_000,
        "seconds": 200.0,
    }


def missed(found: dict[str, Any]) -> list[str]:
    return [target.name for target in report.check_targets(found) if not target.met]


def test_a_good_run_meets_every_target() -> None:
    assert missed(figures()) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"fedit": 2.3}, "federated − fedit, mean (nats)"),
        ({"federated": 2.6, "fedit": 2.7}, "gap base → centralised that federated closes"),
        ({"routed": 2.6}, "gap base → oracle that routed closes"),
        ({"centralised": 2.95, "federated": 2.9}, "base − centralised, mean (nats)"),
        ({"federated": float("nan")}, "gap base → centralised that federated closes"),
    ],
)
def test_a_miss_is_found(changes: dict[str, float], name: str) -> None:
    assert name in missed(figures(**changes))


def test_one_domain_that_got_worse_is_a_miss() -> None:
    found = figures()
    found["domains"]["sql"]["federated"] = 3.1
    assert "federated − base, worst domain (nats)" in missed(found)


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("aggregation", "relative_error"), 1e-4, "aggregation: relative error of the untruncated sum"),
        (("seconds",), 361.0, "seconds in all"),
        (("serving", "errors"), 1, "requests that failed"),
        (("serving", "experts_in_last_version"), 3, "experts that answered in their last version while serving"),
        (("peak_memory_bytes",), 9_000_000_000, "peak memory (GB)"),
    ],
)
def test_limits_are_checked(path: tuple[str, ...], value: float, name: str) -> None:
    found = figures()
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert missed(found) == [name]


class Reader(HTMLParser):
    """Collects what a page refers to and says."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]


def test_the_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path) -> None:
    report.write(report.with_targets(figures()), tmp_path)
    text = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.outside == []
    assert "script" not in reader.tags
    assert reader.tags.count("svg") == 5
    assert "&lt;x86&gt;" in text
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", text)
    assert json.loads((tmp_path / "report.json").read_text())["domains"]["cpp"]["federated"] == 2.4


def test_the_terminal_shows_every_domain_and_every_target() -> None:
    final = report.with_targets(figures(routed=2.9))
    text = io.StringIO()
    report.print_tables(final, Console(file=text, width=120))
    shown = text.getvalue()
    names = [target["name"] for target in final["targets"]]
    assert len(names) == 10
    assert all(word in shown for word in ("cpp", "sql", "mean", *names))
    (missed,) = [line for line in shown.splitlines() if "✗ missed" in line]
    assert "gap base → oracle that routed closes" in missed


def test_a_figure_that_is_no_number_is_null_in_json_and_shown_as_it_is(tmp_path: Path) -> None:
    final = {**report.with_targets(figures(federated=float("nan"))), "odd": [(float("inf"),)]}
    report.write(final, tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["domains"]["cpp"]["federated"] is None and read["odd"] == [[None]]
    assert read["domains"]["cpp"]["base"] == 3.0
    assert "nan" in (tmp_path / "report.html").read_text(encoding="utf-8")
