"""``make fuzz``: both doors of a real service, asked anything.

::

    python -m tests.fuzz.doors --cases 10000 [--seed N]

Half of the cases go to each door (:mod:`tests.fuzz.http_cases`, :mod:`tests.fuzz.grpc_cases`). The seed is printed:
with it the same cases come again. What is found ends the run with the smallest case that shows it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests.fuzz import grpc_cases, http_cases
from tests.fuzz.service import Service, running

_EVERY = 100


def main(
    service: Service, cases: int, *, seed: int, progress: Callable[[int], None] = lambda _number: None
) -> dict[str, Counter[str]]:
    """How many cases got which answer, by door."""
    found = {}
    for name, door in (("http", http_cases), ("grpc", grpc_cases)):
        found[name] = door.run(service, (cases + 1) // 2, seed_number=seed, progress=progress)
        service.check_unharmed()
    return found


def _reporting(cases: int) -> Callable[[int], None]:
    done, began = 0, time.monotonic()

    def progress(number: int) -> None:
        nonlocal done
        done += number
        if done % _EVERY == 0:
            print(f"{done} of {cases} cases, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    return progress


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    arguments = parser.parse_args()
    chosen = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {chosen}", file=sys.stderr, flush=True)
    with running() as started:
        counted = main(started, arguments.cases, seed=chosen, progress=_reporting(arguments.cases))
    print(
        json.dumps({"seed": chosen, **{door: dict(sorted(found.items())) for door, found in counted.items()}}, indent=1)
    )
