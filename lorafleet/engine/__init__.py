"""One base model, many LoRA mixtures in the same batch."""

from lorafleet.engine.engine import Engine
from lorafleet.engine.request import Generation, TokenChunk, TokenMix
from lorafleet.engine.sampling import SamplingParams
from lorafleet.engine.stats import EngineStats
from lorafleet.engine.ticket import Ticket

__all__ = ["Engine", "EngineStats", "Generation", "SamplingParams", "Ticket", "TokenChunk", "TokenMix"]
