from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
import typer.main

from lorafleet.adapters import LoraAdapter, weighted_sum
from lorafleet.assets import base_digest
from lorafleet.cli import app, main
from lorafleet.cli.serving import _register_base
from lorafleet.demo.report import with_targets
from lorafleet.engine import Engine
from lorafleet.errors import LorafleetError, UnavailableError
from lorafleet.registry import Registry
from lorafleet.router_service.server import Server
from tests.demo.test_report import figures
from tests.router_service.models import random_adapter, write_base
from tests.test_documents import commands


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("cli") / "small-base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in PEFT format, of ranks 2 and 5."""
    folder = tmp_path_factory.mktemp("cli-adapters")
    folders = {}
    for name, rank in (("low", 2), ("high", 5)):
        folders[name] = folder / name
        random_adapter(base, rank=rank, seed=rank).save(folders[name])
    return folders


class Store:
    """A registry's two options, and the registry itself."""

    def __init__(self, folder: Path) -> None:
        self.url, self.blobs = f"sqlite:///{folder / 'fleet.db'}", folder / "blobs"
        self.options = ["--registry", self.url, "--blobs", str(self.blobs)]

    def open(self) -> Registry:
        return Registry.open(self.url, self.blobs)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


class Command:
    """Runs ``lorafleet`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path, status: int = 0) -> tuple[str, str]:
        """Standard output and standard error of a command that exits with ``status``."""
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert (end.value.code or 0) == status, err
        return out, err

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self(*arguments, "--json")[0])


@pytest.fixture
def lorafleet(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


# Behaviour of every command


def test_help_names_the_commands_and_loads_no_model_code() -> None:
    code = (
        "import sys\nfrom lorafleet.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "loaded = [m for m in ('torch', 'transformers', 'flwr', 'ray', 'sqlalchemy', 'grpc') if m in sys.modules]\n"
        "print('loaded', loaded)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("demo", "serve", "route", "generate", "aggregate", "adapter", "tenant", "db", "client", "coordinator"):
        assert re.search(rf"\b{name}\b", result.stdout)
    assert result.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize(
    "command",
    [
        ["demo"], ["serve"], ["route"], ["generate"], ["aggregate"], ["adapter", "import"], ["adapter", "list"],
        ["adapter", "show"], ["adapter", "export"], ["tenant", "create"], ["tenant", "list"], ["db", "upgrade"],
        ["db", "check"], ["db", "gc"], ["client", "join"], ["client", "probe"],
        ["client", "evaluate"], ["client", "export"], ["coordinator", "run"],
        ["bench", "engine"], ["bench", "kernels"], ["bench", "client"], ["bench", "aggregate"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_has_help(lorafleet: Command, command: list[str]) -> None:
    out, _ = lorafleet(*command, "--help")
    assert " ".join(["Usage: lorafleet", *command]) in out


def test_every_option_and_argument_is_explained(lorafleet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # so that no text is folded
    for words, command in commands(typer.main.get_command(app)):
        assert command.help, f"lorafleet {' '.join(words)} has no help"
        shown = " ".join(lorafleet(*words, "--help")[0].replace("│", " ").split())
        for parameter in command.params:
            assert parameter.help, f"lorafleet {' '.join(words)}: {parameter.name} has no help"
            assert parameter.help in shown, f"lorafleet {' '.join(words)}: {parameter.name}'s help is not shown"


def test_an_error_is_one_line_on_stderr(lorafleet: Command, store: Store) -> None:
    out, err = lorafleet("adapter", "show", "acme/nothing", *store.options, status=1)
    assert out == ""
    assert re.fullmatch(r"error: .*acme/nothing.*\n", err)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UnavailableError("the  service ended:\n  File x\n\nKeyError: 3\n"),
         "error: the service ended:\n    File x\n\n  KeyError: 3\n"),
        (KeyError("a\nb"), "error: KeyError: 'a\\nb' (--debug shows the traceback)\n"),
        (RuntimeError("found 1\nexpected 2"),
         "error: RuntimeError: found 1 (--debug shows the traceback)\n  expected 2\n"),
        (TimeoutError(), "error: TimeoutError (--debug shows the traceback)\n"),
    ],
    ids=["log", "unforeseen", "unforeseen, of two lines", "wordless"],
)  # fmt: skip
def test_what_an_error_quotes_stands_below_its_line_as_it_was(
    lorafleet: Command, store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lorafleet.registry.schema.check", fail)
    assert lorafleet("db", "check", "--registry", store.url, status=1) == ("", said)


def test_debug_shows_the_traceback(store: Store) -> None:
    command = [sys.executable, "-m", "lorafleet.cli", "--debug", "adapter", "show", "a/b", *store.options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "NotFoundError" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["nothing"],
        ["serve", "--base", "tiny", "--adapter", "no-folder"],
        ["serve", "--base", "tiny", "--registry", "sqlite:///x.db"],
        ["serve", "--base", "tiny", "--registry", "sqlite:///x.db", "--blobs", "b", "--adapter", "a=b"],
        ["generate", "text", "--api-key", "k", "--mix", "acme/a"],
        ["generate", "text", "--api-key", "k", "--mix", "acme/a=heavy"],
        ["generate", "text", "--api-key", "k", "--mix", "acme/a=1", "--mix", "acme/a=2"],
        ["serve", "--base", "tiny", "--registry", "sqlite:///x.db", "--blobs", "b", "--api-key", "k" * 16],
        ["serve", "--base", "tiny", "--api-key", "k" * 16, "--api-key-file", "key"],
        ["serve", "--base", "tiny", "--tls-cert", "server.crt"],
        ["serve", "--base", "tiny", "--client-ca", "ca.crt"],
        ["route", "text"],
        ["aggregate", "--rule", "exact", "--out", "x", "a=1", "b"],
        ["aggregate", "--rule", "exact", "--out", "x", "a", "a"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_2(lorafleet: Command, arguments: list[str]) -> None:
    out, err = lorafleet(*arguments, status=2)
    assert out == "" and "Error" in err


# Registry


def test_tenants_are_created_and_listed(lorafleet: Command, store: Store) -> None:
    assert lorafleet.json("tenant", "create", "acme", "--weight", "2", *store.options)["weight"] == 2.0
    lorafleet("tenant", "create", "beta", *store.options)
    assert [tenant["name"] for tenant in lorafleet.json("tenant", "list", *store.options)] == ["acme", "beta"]
    assert "acme" in lorafleet("tenant", "list", *store.options)[0]
    assert "already" in lorafleet("tenant", "create", "acme", *store.options, status=1)[1]
    assert lorafleet.json("tenant", "weight", "beta", "0.5", *store.options)["weight"] == 0.5
    assert "acme  3" in lorafleet("tenant", "weight", "acme", "3", *store.options)[0]
    assert [tenant["weight"] for tenant in lorafleet.json("tenant", "list", *store.options)] == [3.0, 0.5]
    assert "above 0" in lorafleet("tenant", "weight", "acme", "0", *store.options, status=1)[1]


def test_an_adapter_goes_in_and_comes_out_unchanged(
    lorafleet: Command, store: Store, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    lorafleet("tenant", "create", "acme", *store.options)
    command = ("adapter", "import", "acme/sql", adapters["low"], "--base", base, *store.options)
    first = lorafleet.json(*command)
    digest = LoraAdapter.load(adapters["low"]).digest
    assert (first["reference"], first["digest"], first["rank"]) == ("acme/sql:1", digest, 2)
    assert lorafleet.json(*command)["reference"] == "acme/sql:2"

    listed = lorafleet.json("adapter", "list", "--tenant", "acme", *store.options)
    assert [row["reference"] for row in listed] == ["acme/sql:1", "acme/sql:2"]
    assert digest in lorafleet("adapter", "list", "--tenant", "acme", *store.options)[0]

    shown = lorafleet.json("adapter", "show", "acme/sql", *store.options)
    assert (shown["reference"], shown["state"], shown["base"]) == ("acme/sql:2", "staged", base_digest(base))
    assert (shown["lineage"], shown["evaluations"]) == (None, [])

    out = tmp_path / "exported"
    assert lorafleet.json("adapter", "export", "acme/sql:1", "--out", out, *store.options)["digest"] == digest
    assert LoraAdapter.load(out).digest == digest


def test_show_tells_where_an_expert_comes_from(
    lorafleet: Command, store: Store, base: Path, adapters: dict[str, Path]
) -> None:
    from lorafleet.registry import NewExpert

    with store.open() as registry:
        registry.create_tenant("acme")
        registry.register_base("small", base_digest(base), architecture="LlamaForCausalLM", parameters=1)
        federation = registry.create_federation("acme", "fed", base="small", settings={})
        opened = registry.open_round(federation, 1)
        expert = NewExpert("shared", LoraAdapter.load(adapters["low"]), rule="exact", parents=(), members=3)
        (version,) = registry.commit_round(opened, [expert], report={})
        registry.add_member(federation, "m", tenant="acme")
        registry.record_evaluation(version, member="m", loss=1.25, tokens=1000)
    shown = lorafleet.json("adapter", "show", "acme/shared", *store.options)
    assert (shown["lineage"]["federation"], shown["lineage"]["round"], shown["lineage"]["rule"]) == ("fed", 1, "exact")
    assert (shown["lineage"]["members"], shown["evaluations"][0]["loss"]) == (3, 1.25)
    said = lorafleet("adapter", "show", "acme/shared", *store.options)[0]
    assert "1.2500" in said and "'members': 3" in said
    (row,) = lorafleet.json("adapter", "list", "--tenant", "acme", *store.options)
    assert row["aliases"] == ["champion"]


def test_importing_to_a_numbered_reference_is_refused(
    lorafleet: Command, store: Store, adapters: dict[str, Path]
) -> None:
    command = ("adapter", "import", "acme/sql:3", adapters["low"], "--base", "tiny", *store.options)
    assert "expected TENANT/ADAPTER" in " ".join(lorafleet(*command, status=2)[1].split())


def test_an_adapter_for_another_base_is_refused(lorafleet: Command, store: Store, adapters: dict[str, Path]) -> None:
    with store.open() as registry:
        registry.create_tenant("acme")
    command = ("adapter", "import", "acme/low", adapters["low"], "--base", "tiny", *store.options)
    _, said = lorafleet(*command, status=1)
    assert said.startswith("error: ") and "the base that it was trained on" in said
    with store.open() as registry:
        assert registry.adapters("acme") == []


def test_a_database_is_upgraded_and_checked(lorafleet: Command, store: Store) -> None:
    fresh = lorafleet("db", "check", "--registry", store.url, "--json", status=1)[0]
    assert json.loads(fresh)["ok"] is False
    assert lorafleet.json("db", "upgrade", "--registry", store.url)["revision"]
    assert lorafleet.json("db", "check", "--registry", store.url) == {"ok": True, "differences": []}


# Aggregation


def test_aggregation_is_the_weighted_sum_of_the_products(
    lorafleet: Command, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "joint"
    low, high = adapters["low"], adapters["high"]
    result = lorafleet.json("aggregate", "--rule", "exact", "--out", out, f"{low}=0.25", f"{high}=2")
    joint = LoraAdapter.load(out)
    assert (result["digest"], result["rank"]) == (joint.digest, 7)
    expected = weighted_sum([LoraAdapter.load(low), LoraAdapter.load(high)], [0.25, 2.0])
    for path in expected.modules:
        torch.testing.assert_close(joint.delta(path), expected.delta(path), rtol=1e-5, atol=1e-5)


def test_aggregation_without_weights_is_the_mean_and_compresses_to_a_rank(
    lorafleet: Command, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "mean"
    result = lorafleet.json("aggregate", "--rule", "exact", "--out", out, "--rank", "3", *adapters.values())
    assert list(result["weights"].values()) == [0.5, 0.5]
    assert LoraAdapter.load(out).rank == result["rank"] == 3
    assert 0 < result["largest_relative_error"] < 1


def test_an_unknown_rule_is_answered_with_the_known_ones(lorafleet: Command, adapters: dict[str, Path]) -> None:
    _, err = lorafleet("aggregate", "--rule", "magic", "--out", "x", adapters["low"], status=1)
    assert "unknown rule 'magic'" in err and "exact" in err


# Federations: that the commands reach their parts; the parts have tests of their own


def test_joining_with_data_that_is_not_there_is_an_error(lorafleet: Command, tmp_path: Path) -> None:
    data = tmp_path / "nothing"
    command = ("client", "join", "--superlink", "127.0.0.1:1", "--data", data, "--member", "m", "--insecure")
    assert re.match(r"error: .*nothing", lorafleet(*command, status=1)[1])


def test_a_federation_file_that_is_not_there_is_an_error(lorafleet: Command, tmp_path: Path) -> None:
    assert re.match(r"error: .*none\.toml", lorafleet("coordinator", "run", tmp_path / "none.toml", status=1)[1])


def test_the_demo_leaves_folders_of_others_alone(lorafleet: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "is not empty" in lorafleet("demo", "--out", tmp_path, status=1)[1]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def demo_that_finds(monkeypatch: pytest.MonkeyPatch, **changes: float) -> dict[str, Any]:
    """Puts a finished run's report in the place of the demo; ``changes`` go into every domain's losses."""
    report = with_targets(figures(**changes))
    monkeypatch.setattr("lorafleet.demo.run.run_demo", lambda out: report)
    return report


def test_the_demo_prints_its_report_as_one_document(
    lorafleet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = demo_that_finds(monkeypatch)
    out, err = lorafleet("demo", "--out", tmp_path, "--json")
    assert (json.loads(out), err) == (json.loads(json.dumps(report)), "")


def test_the_demo_prints_its_tables_and_where_the_report_is(
    lorafleet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_that_finds(monkeypatch)
    out, err = lorafleet("demo", "--out", tmp_path)
    assert err == ""
    assert "served 10 requests of 2 tenants" in out and "✗" not in out
    assert out.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"


def test_a_missed_target_of_the_demo_is_printed_and_is_its_exit_status(
    lorafleet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_that_finds(monkeypatch, routed=2.9)
    out, _ = lorafleet("demo", "--out", tmp_path, status=1)
    (missed,) = [line for line in out.splitlines() if "✗ missed" in line]
    assert "gap base → oracle that routed closes" in missed
    found = json.loads(lorafleet("demo", "--out", tmp_path, "--json", status=1)[0])
    assert [target["met"] for target in found["targets"]].count(False) == 1


# A running server


class Running(NamedTuple):
    address: str
    key: str


@pytest.fixture
def server(base: Path, adapters: dict[str, Path], store: Store) -> Iterator[Running]:
    torch.set_num_threads(1)
    with store.open() as registry, Engine.load(base, dtype="float32", max_sequences=4) as engine:
        registry.create_tenant("acme")
        registry.register_base("small", engine.base_digest, architecture="LlamaForCausalLM", parameters=1)
        for name, folder in adapters.items():
            registry.create_adapter("acme", name, base="small")
            registry.add_version("acme", name, LoraAdapter.load(folder))
        server = Server(engine, registry)
        server.start()
        yield Running(server.address, registry.create_key("acme").token)
        server.stop()


def test_generate_and_route_ask_the_server(
    lorafleet: Command, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--api-key", server.key, "--server", server.address)
    text = ("generate", "hello", *options, "--max-tokens", "6", "--mix", "acme/low=0.5", "--mix", "acme/high=0.25")
    result = lorafleet.json(*text, "--logprobs")
    assert len(result["token_ids"]) == len(result["logprobs"]) == 6
    assert {part["reference"]: part["weight"] for part in result["mix"]} == {"acme/low:1": 0.5, "acme/high:1": 0.25}
    out, err = lorafleet(*text)
    assert out == result["text"] + "\n"
    assert "0.5 × acme/low:1" in err and "6 generated tokens" in err

    decision = lorafleet.json("route", "hello", *options)
    assert {candidate["reference"] for candidate in decision["candidates"]} == {"acme/low:1", "acme/high:1", "base"}
    out, _ = lorafleet("route", "hello", *options)
    assert out.splitlines()[-1] == f"likelihood: {decision['reason']}"

    _, err = lorafleet("generate", "hello", *options, "--max-tokens", "2", "--model", "auto")
    assert decision["reason"] in err
    _, err = lorafleet("generate", "hello", *options, "--model", "rival/secret", status=1)
    assert "not there, or is not yours" in err

    file = tmp_path / "key"
    file.write_text(server.key + "\n")
    monkeypatch.setenv("LORAFLEET_API_KEY", "of somebody else")
    asked = ("route", "hello", "--server", server.address)
    assert lorafleet.json(*asked, "--api-key-file", file) == decision
    assert "opens nothing" in lorafleet(*asked, status=1)[1]
    monkeypatch.setenv("LORAFLEET_API_KEY", server.key)
    assert lorafleet.json(*asked) == decision


KEY = "a-key-that-the-operator-chose"


@contextmanager
def serving(*arguments: str | Path, http: str = "") -> Iterator[tuple[subprocess.Popen[str], str, str | None]]:
    """``lorafleet serve`` as a process, and the addresses of gRPC and HTTP that it printed."""
    command = [sys.executable, "-m", "lorafleet.cli", "serve", "--grpc", "127.0.0.1:0", "--http", http]
    with subprocess.Popen(
        [*command, "--threads", "1", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            ready = re.fullmatch(r"listening grpc=(127\.0\.0\.1:\d+)(?: http=(127\.0\.0\.1:\d+))?\n", line)
            assert ready, f"{line!r}: {process.stderr.read() if process.stderr else ''}"
            assert (ready[2] is not None) == bool(http)
            yield process, ready[1], ready[2]
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.process
def test_serve_with_a_temporary_registry_until_sigterm(
    lorafleet: Command, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    options = ("--base", base, "--adapter", f"low={adapters['low']}", "--api-key-file", file)
    with serving(*options, http="127.0.0.1:0") as (process, address, http):
        digest = LoraAdapter.load(adapters["low"]).digest
        asked = ("generate", "hello", "--api-key", KEY, "--server", address, "--model", "local/low")
        assert lorafleet.json(*asked, "--max-tokens", "3")["mix"][0]["digest"] == digest
        with openai.OpenAI(base_url=f"http://{http}/v1", api_key=KEY) as client:
            answer = client.completions.create(model="local/low", prompt="hello", max_tokens=3)
        assert answer.model_dump()["lorafleet"]["mix"][0]["digest"] == digest
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == "" and "Traceback" not in err and KEY not in err


@pytest.mark.process
def test_serve_without_a_key_makes_one_and_says_it_once(lorafleet: Command, base: Path) -> None:
    with serving("--base", base) as (process, address, _):
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    tokens = re.findall(r"lf_[a-z0-9]{12}_[A-Za-z0-9_-]{43}", err)
    assert address and len(tokens) == 1


@pytest.mark.process
def test_serve_follows_a_registry_that_others_write_to(
    lorafleet: Command, base: Path, adapters: dict[str, Path], store: Store
) -> None:
    lorafleet("tenant", "create", "acme", *store.options)
    with serving("--base", base, *store.options) as (_, address, _):
        lorafleet("adapter", "import", "acme/sql", adapters["high"], "--base", base, *store.options)
        with store.open() as registry:
            options = ("--api-key", registry.create_key("acme").token, "--server", address)
        result = lorafleet.json("generate", "hello", *options, "--model", "acme/sql", "--max-tokens", "3")
        assert result["mix"][0]["reference"] == "acme/sql:1"


def test_serve_enters_the_shapes_of_a_base_that_was_registered_without_them(
    store: Store, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    stray = tmp_path / "stray"
    LoraAdapter({"no.such.layer": next(iter(LoraAdapter.load(adapters["low"]).modules.values()))}).save(stray)
    with store.open() as registry:
        registry.create_tenant("acme")
        digest = base_digest(base)
        registry.register_base("known", digest, architecture="LlamaForCausalLM", parameters=1)
        registry.create_adapter("acme", "sql", base="known")
        _register_base(registry, str(base), digest)
        assert registry.base(digest).name == "known"
        with pytest.raises(LorafleetError, match=r"no\.such\.layer"):
            registry.import_version("acme", "sql", stray)
        assert registry.import_version("acme", "sql", adapters["low"]).number == 1


def test_serve_refuses_to_listen_beyond_loopback(lorafleet: Command, base: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _, err = lorafleet("serve", "--base", base, "--grpc", "0.0.0.0:50051", status=1)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "loopback" in err
