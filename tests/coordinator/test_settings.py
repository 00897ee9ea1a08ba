"""The federation file: what is read, and what is refused instead of ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.coordinator.settings import CoordinatorConfig, FederationSettings
from lorafleet.errors import InvalidInputError, NotFoundError, UnknownNameError

GOOD = """
[federation]
tenant = "operator"
name = "fleet"
rounds = 5
[training]
steps = 7
[policy]
max_norm = 10.0
[coordinator]
registry = "sqlite:///x.db"
blobs = "blobs"
ray_address = "local"
superlink = "127.0.0.1:1"
[members]
acme = "acme"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "federation.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_with_blobs_relative_to_it(tmp_path: Path) -> None:
    config = CoordinatorConfig.load(write(tmp_path, GOOD))
    assert config.federation.rounds == 5
    assert config.federation.training.steps == 7
    assert config.federation.policy.max_norm == 10.0
    assert config.blobs == tmp_path / "blobs"
    assert config.members == {"acme": "acme"}


def test_settings_survive_the_registry(tmp_path: Path) -> None:
    settings = CoordinatorConfig.load(write(tmp_path, GOOD)).federation
    assert FederationSettings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("find", "replacement", "words"),
    [
        ("rounds = 5", "round = 5", "unknown keys round"),
        ("steps = 7", "step = 7", "unknown keys step"),
        ("[members]", "[member]", "unknown tables member"),
        ('tenant = "operator"\n', "", "tenant"),
        ("rounds = 5", "rounds = 0", "expected at least 1"),
        ("rounds = 5", "min_cluster_size = 1", "expected at least 2"),
        ("rounds = 5", "deadline_s = 0.0", "above 0"),
        ("rounds = 5", "rounds = ", "not TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, find: str, replacement: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        CoordinatorConfig.load(write(tmp_path, GOOD.replace(find, replacement)))


@pytest.mark.parametrize(("key", "known"), [("rule", "exact, fedit"), ("scheduler", "sync")])
def test_unknown_plug_ins_list_the_known_ones(tmp_path: Path, key: str, known: str) -> None:
    with pytest.raises(UnknownNameError, match=known):
        CoordinatorConfig.load(write(tmp_path, GOOD.replace("rounds = 5", f'{key} = "best"')))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no federation file at .*nowhere\.toml"):
        CoordinatorConfig.load(tmp_path / "nowhere.toml")
