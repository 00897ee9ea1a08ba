"""Requests of whatever the HTTP API's description allows, and of what it does not (schemathesis).

Every answer has to be as described: its status, its content type, its headers, its JSON. What is not allowed has to be
refused, and nothing is answered without a key. No answer may be a server's error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from lorafleet.router_service.http import openapi
from tests.fuzz.service import NOT_OWN, OWN, Service

_CALL_S = 600.0
"""A busy machine is no fault."""
EXCLUDED = ("positive_data_acceptance",)
"""What fits the description may still name no model, or be too long for the base: that is a 400, too."""


def run(
    service: Service, cases: int, *, seed_number: int, progress: Callable[[int], None], shrink: bool = True
) -> Counter[str]:
    """So many cases; how many got which answer. Raises what schemathesis finds, with the smallest such case."""
    counted: Counter[str] = Counter()
    load_all_checks()
    checks = [check for check in CHECKS.get_all() if check.__name__ not in EXCLUDED]
    schema = schemathesis.openapi.from_dict(openapi.document())
    schema.config.update(base_url=service.url)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    kinds = [(one.as_strategy(mode), 6 if one.body else 1) for one in operations for mode in GenerationMode]
    drawn = st.sampled_from([kind for kind, share in kinds for _ in range(share)]).flatmap(lambda kind: kind)
    names = st.none() | st.sampled_from((*OWN, *NOT_OWN))
    session = requests.Session()

    @seed(seed_number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=drawn, model=names, adapter=names)
    def one(case: Any, model: str | None, adapter: str | None) -> None:
        if isinstance(case.body, dict) and case.meta is not None and case.meta.generation.mode.is_positive:
            # Names that exist are hardly ever drawn by chance.
            case.body = {**case.body, **({"model": model} if model is not None else {})}
            if adapter is not None and case.body.get("mix"):
                case.body["mix"] = {adapter: next(iter(case.body["mix"].values()))}
        token = service.metrics_token if case.operation.path == "/metrics" else service.token
        headers = {"authorization": f"Bearer {token}"}
        response = case.call(session=session, headers=headers, timeout=_CALL_S)
        case.validate_response(response, checks=checks, headers=headers)
        counted[f"{case.operation.label} {response.status_code}"] += 1
        progress(1)

    one()
    return counted
