"""What a member's machine is to train with: its owner's choice, where an order says what is trained. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafleet.errors import InvalidInputError

# The rank of a member that says none, where nothing was measured.
DEFAULT_RANK = 8
# The probe's time at joining: enough for a base of a billion parameters on a few cores.
PROBE_S = 10.0
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class LocalLimits:
    """The same residual comes out, up to rounding, whatever is chosen here; but for ``top_layers``, which trains less.

    What is None is left to the probe where there is one, else to the default that is named.
    """

    device: str = "auto"
    """``auto`` (CUDA where there is some), ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = "auto"
    """How the base is held and multiplied; ``auto`` is bfloat16 where it is the faster one, else float32."""
    micro_batch: int | None = None
    """Sequences that are computed at a time; gradients add up to the whole batch's. Default: all of a batch."""
    checkpointing: bool | None = None
    """Whether layers are computed a second time in the backward pass instead of kept. Default: no."""
    top_layers: int | None = None
    """Only so many of the base's last layers get a residual; below them no graph is built. Default: all."""
    threads: int | None = None
    """CPU threads. Default: torch's."""
    least_noise: float = 0.0
    """Orders that ask for less noise on an update than so many times its largest norm are refused; 0 refuses none."""
    most_epsilon: float = 0.0
    """What all orders of per-sample privacy may spend together, of whatever federation; 0 leaves it to each order."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "top_layers", "threads"):
            found = getattr(self, name)
            if found is not None and found < 1:
                raise InvalidInputError(f"{name}: found {found}, expected at least 1")
        if not 0 <= self.least_noise < math.inf:
            raise InvalidInputError(f"least_noise: found {self.least_noise}, expected a finite number, or 0 for any")
        if not 0 <= self.most_epsilon < math.inf:
            raise InvalidInputError(f"most_epsilon: found {self.most_epsilon}, expected a finite number, or 0 for any")
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
