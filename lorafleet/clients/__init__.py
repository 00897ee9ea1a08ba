"""The data owner's side: a dataset, a trainer, and the Flower client that ties them to a federation.

Names are loaded when they are first used: a Flower task that only says who it is must not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafleet.clients.app import client_app
    from lorafleet.clients.data import JsonLines, Split, TextFolder, Texts, open_texts, pack, split_texts
    from lorafleet.clients.join import join_federation
    from lorafleet.clients.member import Member, Update, carry_out
    from lorafleet.clients.trainer import TrainResult, TrainSettings, held_out_loss, load_base, train_residual

_HOME = {
    **dict.fromkeys(("JsonLines", "Split", "TextFolder", "Texts", "open_texts", "pack", "split_texts"), "data"),
    **dict.fromkeys(("TrainResult", "TrainSettings", "held_out_loss", "load_base", "train_residual"), "trainer"),
    **dict.fromkeys(("Member", "Update", "carry_out"), "member"),
    "client_app": "app",
    "join_federation": "join",
}

__all__ = [
    "JsonLines",
    "Member",
    "Split",
    "TextFolder",
    "Texts",
    "TrainResult",
    "TrainSettings",
    "Update",
    "carry_out",
    "client_app",
    "held_out_loss",
    "join_federation",
    "load_base",
    "open_texts",
    "pack",
    "split_texts",
    "train_residual",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
