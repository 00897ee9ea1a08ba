"""The federation file: what is read, and what is refused instead of ignored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorafleet.coordinator.settings import (
    CoordinatorConfig,
    Difference,
    FederationSettings,
    check_terms,
    differences,
)
from lorafleet.errors import InvalidInputError, NotFoundError, UnknownNameError
from lorafleet.registry import Federation

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


def test_weights_in_an_object_store_stay_under_their_url(tmp_path: Path) -> None:
    text = GOOD.replace('blobs = "blobs"', 'blobs = "s3://bucket/p?region=eu-west-1"')
    assert CoordinatorConfig.load(write(tmp_path, text)).blobs == "s3://bucket/p?region=eu-west-1"


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
        ("steps = 7", "steps = 0", "training.steps is 0, expected at least 1"),
        ("steps = 7", "steps = -3", "training.steps is -3"),
        ("steps = 7", 'steps = "7"', r"\[training\]: steps is '7', expected a whole number"),
        ("steps = 7", "steps = true", "steps is True, expected a whole number"),
        ("steps = 7", f"steps = {2**63}", "expected a whole number of at most 64 bits"),
        ("steps = 7", "batch_size = 0", "batch_size is 0"),
        ("steps = 7", "sequence_length = 1", "sequence_length is 1"),
        ("steps = 7", "rank = -1", "rank is -1, expected at least 0"),
        ("steps = 7", 'learning_rate = "1e-2"', "learning_rate is '1e-2', expected a number"),
        ("steps = 7", "learning_rate = 0.0", "learning_rate is 0.0"),
        ("steps = 7", "learning_rate = nan", "learning_rate is nan"),
        ("rounds = 5", "rounds = 2.5", "rounds is 2.5, expected a whole number"),
        ("rounds = 5", 'evaluate_last = "no"', "evaluate_last is 'no', expected true or false"),
        ("rounds = 5", "deadline_s = inf", "deadline_s is inf"),
        ("rounds = 5", "rule = []", r"rule is \[\], expected a string"),
        ("rounds = 5", "base = 5", "base is 5, expected a string"),
        ('tenant = "operator"', "tenant = 5", "tenant is 5, expected a string"),
        ("max_norm = 10.0", 'max_norm = "big"', "max_norm is 'big', expected a number"),
        ("max_norm = 10.0", "max_norm = -1.0", "max_norm is -1.0"),
        ("max_norm = 10.0", "max_rank = 0", "max_rank is 0"),
        ("max_norm = 10.0", "max_examples = 0", "max_examples is 0"),
        ('acme = "acme"', "acme = 5", r"\[members\]: acme is 5, expected the name of its tenant"),
        ('acme = "acme"', '[members.acme]\ntenant = "acme"', r"\[members\]: acme is \{"),
        ('registry = "sqlite:///x.db"', "registry = 5", "registry is 5, expected a string"),
        ('registry = "sqlite:///x.db"', 'registry = "x.db"', "expected sqlite:///FILE"),
        ('blobs = "blobs"', "blobs = 1", "blobs is 1, expected a path"),
        ('superlink = "127.0.0.1:1"', "superlink = 8000", "superlink is 8000"),
        ('superlink = "127.0.0.1:1"', 'superlink = "10.0.0.1:1"', "expected root_certificates"),
        ('superlink = "127.0.0.1:1"', 'superlink = "localhost.example.com:1"', "expected root_certificates"),
        ('"local"', '"local"\ninsecure = "no"', "insecure is 'no', expected true or false"),
        ('"local"', '"local"\ninsecure = true\nroot_certificates = "ca.crt"', "give one of the two"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, find: str, replacement: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        CoordinatorConfig.load(write(tmp_path, GOOD.replace(find, replacement)))


@pytest.mark.parametrize("name", ["federation", "training", "policy", "robust", "coordinator", "members"])
def test_a_table_is_a_table(tmp_path: Path, name: str) -> None:
    text = re.sub(rf"\[{name}\]\n([^\[].*\n)*", "", GOOD)
    with pytest.raises(InvalidInputError, match=rf"{name} is 5, expected a table \[{name}\]"):
        CoordinatorConfig.load(write(tmp_path, f"{name} = 5\n{text}"))


def test_a_file_in_another_encoding_is_said(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_bytes("# Größe\n".encode("latin-1") + GOOD.encode())
    with pytest.raises(InvalidInputError, match="is not TOML in UTF-8"):
        CoordinatorConfig.load(path)


def test_paths_are_relative_to_the_file_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD.replace("rounds = 5", 'base = "bases/mine"'))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = CoordinatorConfig.load(Path("../federation.toml"))
    assert config.registry == f"sqlite:///{tmp_path / 'x.db'}"
    assert config.federation.base == str(tmp_path / "bases" / "mine")
    assert config.blobs == tmp_path / "blobs"


@pytest.mark.parametrize("url", ["sqlite:////var/lib/registry.db", "postgresql://fleet:secret@db.example.com/fleet"])
def test_a_registry_that_does_not_depend_on_a_folder_stays_as_it_is_written(tmp_path: Path, url: str) -> None:
    assert CoordinatorConfig.load(write(tmp_path, GOOD.replace("sqlite:///x.db", url))).registry == url


def test_a_shipped_base_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert CoordinatorConfig.load(write(tmp_path, GOOD)).federation.base == "tiny"


@pytest.mark.parametrize(("key", "known"), [("rule", "exact, fedex, fedit"), ("scheduler", "buffered, compass, sync")])
def test_unknown_plug_ins_list_the_known_ones(tmp_path: Path, key: str, known: str) -> None:
    with pytest.raises(UnknownNameError, match=known):
        CoordinatorConfig.load(write(tmp_path, GOOD.replace("rounds = 5", f'{key} = "best"')))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no federation file at .*nowhere\.toml"):
        CoordinatorConfig.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("superlink", ["127.0.0.1:1", "127.8.0.1:1", "localhost:1", "[::1]:1"])
def test_tls_is_left_out_unasked_on_loopback_alone(tmp_path: Path, superlink: str) -> None:
    config = CoordinatorConfig.load(write(tmp_path, GOOD.replace("127.0.0.1:1", superlink)))
    assert (config.insecure, config.root_certificates) == (True, None)


@pytest.mark.parametrize("superlink", ["127.0.0.1:1", "link.example.com:443"])
@pytest.mark.parametrize(
    ("said", "insecure", "certificates"),
    [
        ("insecure = true", True, None),
        ("insecure = false", False, None),
        ('root_certificates = "certs/ca.crt"', False, "certs/ca.crt"),
        ('insecure = false\nroot_certificates = "certs/ca.crt"', False, "certs/ca.crt"),
    ],
)
def test_what_is_said_about_tls_holds_everywhere(
    tmp_path: Path, superlink: str, said: str, insecure: bool, certificates: str | None
) -> None:
    text = GOOD.replace('superlink = "127.0.0.1:1"', f'superlink = "{superlink}"\n{said}')
    config = CoordinatorConfig.load(write(tmp_path, text))
    assert config.insecure == insecure
    assert config.root_certificates == (tmp_path / certificates if certificates else None)


def test_differences_are_named_by_key_with_both_values() -> None:
    recorded = {"rule": "exact", "rounds": 3, "training": {"steps": 24, "rank": 0}, "gone": 1}
    asked = {"rule": "fedit", "rounds": 3.0, "training": {"steps": 7, "rank": 0}, "new": {"limit": 2}}
    assert differences(recorded, asked) == [
        Difference("gone", None, 1),
        Difference("new.limit", 2, None),
        Difference("rule", "fedit", "exact"),
        Difference("training.steps", 7, 24),
    ]
    assert differences(recorded, recorded) == []


DIGEST = "sha256:" + "b" * 64
MEMBERS = {"acme": "acme", "globex": "globex"}


def recorded(config: CoordinatorConfig) -> Federation:
    return Federation(1, "operator", "fleet", "tiny", DIGEST, config.federation.to_dict(), 0.0)


@pytest.mark.parametrize(
    ("find", "replacement", "words"),
    [
        ("rounds = 5", "expert_rank = 16", "expert_rank: found 16, recorded 32"),
        ("rounds = 5", 'rule = "fedit"', "rule: found 'fedit', recorded 'exact'"),
        ("rounds = 5", "seed = 4", "seed: found 4, recorded 0"),
        ("rounds = 5", "min_cluster_size = 3", "min_cluster_size: found 3, recorded 2"),
        ("steps = 7", "steps = 8\nrank = 4", "training.rank: found 4, recorded 0; training.steps: found 8, recorded 7"),
        ("max_norm = 10.0", "max_norm = 11.0", "policy.max_norm: found 11.0, recorded 10.0"),
        ("[training]", "[robust]\nclip = 2.0\n[training]", "robust.clip: found 2.0, recorded 0.0"),
        ('acme = "acme"', 'acme = "globex"', "members.acme: found 'globex', recorded 'acme'"),
    ],
)
def test_terms_that_experts_are_made_of_stay_as_they_were_recorded(
    tmp_path: Path, find: str, replacement: str, words: str
) -> None:
    federation = recorded(CoordinatorConfig.load(write(tmp_path, GOOD)))
    changed = CoordinatorConfig.load(write(tmp_path, GOOD.replace(find, replacement)))
    with pytest.raises(InvalidInputError, match=rf"operator/fleet .*: {words}\. Restore .* or name another federation"):
        check_terms(changed, DIGEST, federation, MEMBERS)


def test_another_base_is_refused_under_the_same_name(tmp_path: Path) -> None:
    config = CoordinatorConfig.load(write(tmp_path, GOOD))
    other = "sha256:" + "c" * 64
    with pytest.raises(InvalidInputError, match=f"base: found '{other}', recorded '{DIGEST}'"):
        check_terms(config, other, recorded(config), MEMBERS)


def test_a_run_may_change_how_long_it_takes_and_where_the_base_lies(tmp_path: Path) -> None:
    federation = recorded(CoordinatorConfig.load(write(tmp_path, GOOD)))
    keys = 'base = "elsewhere"\nrounds = 9\ndeadline_s = 1\nat_once = 2\nevaluate_last = false\nquorum = 3'
    changed = CoordinatorConfig.load(write(tmp_path, GOOD.replace("rounds = 5", keys)))
    assert check_terms(changed, DIGEST, federation, MEMBERS) == [
        Difference("at_once", 2, 0),
        Difference("deadline_s", 1, 600.0),
        Difference("evaluate_last", False, True),
        Difference("quorum", 3, 2),
        Difference("rounds", 9, 5),
    ]


def test_a_key_that_an_older_registry_did_not_record_counts_as_its_default(tmp_path: Path) -> None:
    config = CoordinatorConfig.load(write(tmp_path, GOOD))
    settings = config.federation.to_dict()
    del settings["seed"]
    federation = Federation(1, "operator", "fleet", "tiny", DIGEST, settings, 0.0)
    assert check_terms(config, DIGEST, federation, MEMBERS) == []
    changed = CoordinatorConfig.load(write(tmp_path, GOOD.replace("rounds = 5", "rounds = 5\nseed = 1")))
    with pytest.raises(InvalidInputError, match="seed: found 1, recorded 0"):
        check_terms(changed, DIGEST, federation, MEMBERS)
