"""The documents name what exists: links, paths, the tree of docs/structure.md, and command lines that parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from lorafleet.cli import app

ROOT = Path(__file__).resolve().parent.parent
STRUCTURE = ROOT / "docs" / "structure.md"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "lorafleet" / "assets" / "tiny_base" / "README.md",
]

# Words in back-ticks that look like a path of the repository, and are none.
NOT_OURS = {
    "*.txt": "a pattern",
    ".jsonl": "an ending",
    "train/": "a folder of an owner's data",
    "held_out/": "a folder of an owner's data",
    "demo-out/report.json": "written by a run",
    "demo-out/report.html": "written by a run",
}
# Without spaces, with a slash or an ending that files have.
PATH = re.compile(r"[\w.*-]*/[\w.*/-]*|[\w.*-]*\.(py|md|toml|txt|json|jsonl|html|proto|mako|sh|ya?ml|safetensors)")
# Words in capitals stand for something: rules/NAME.py, TENANT/ADAPTER; but for the files that are called so.
PLACEHOLDER = re.compile(r"(^|[/_.-])(?!(README|CONTRIBUTING)\.md$)[A-Z]{2,}([/_.-]|$)")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def dead_links(text: str, folder: Path) -> list[str]:
    """Relative links of a page in ``folder`` that lead nowhere."""
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [t for t in targets if t and not re.match(r"[a-z]+:", t) and not (folder / t).exists()]


def named_paths(text: str) -> set[str]:
    """Words in back-ticks, outside of fenced blocks, that read like a path of the repository."""
    words = {word for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) for word in span.split()}
    return {word for word in words if PATH.fullmatch(word) and not PLACEHOLDER.search(word)}


def missing_paths(text: str, folder: Path) -> list[str]:
    """Named paths that exist neither from the root, nor from the package, nor beside the page."""
    places = (ROOT, ROOT / "lorafleet", folder)
    return sorted(p for p in named_paths(text) - NOT_OURS.keys() if not any((place / p).exists() for place in places))


def tree_paths(text: str) -> list[str]:
    """Paths of a caption tree: two spaces a level, names at a line's start, a caption after two or more spaces."""
    (block,) = (body for _, body in FENCE.findall(text) if body.startswith("lorafleet/\n"))
    found: list[str] = []
    above: list[str] = []
    for line in block.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            above[level:] = [name]
            found.append("".join(above))
    return found


def commands(command: click.Command, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below this one, with the words that call it."""
    yield names, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, *names, name)


def command_lines(text: str) -> list[str]:
    """Lines of fenced blocks that call ``lorafleet``, with what continues them."""
    blocks = (body.replace("\\\n", " ") for _, body in FENCE.findall(text))
    return [line.strip() for body in blocks for line in body.splitlines() if re.match(r"\s*lorafleet\s", line)]


def refused(line: str) -> str:
    """Why the command line does not parse, or nothing; no command runs."""
    command = typer.main.get_command(app)
    words = [word for word in shlex.split(line, comments=True)[1:] if not re.match(r"\d?>", word)]  # the shell's
    try:
        while isinstance(command, click.Group):
            context = click.Context(command)
            _, words, _ = command.make_parser(context).parse_args(words)
            _, found, words = command.resolve_command(context, words)
            assert found is not None
            command = found
        command.make_context("", words)
    except click.ClickException as error:
        return f"{line}: {error.format_message()}"
    return ""


@by_document
def test_links_lead_somewhere(document: Path) -> None:
    assert dead_links(document.read_text(), document.parent) == []


@by_document
def test_named_paths_exist(document: Path) -> None:
    assert missing_paths(document.read_text(), document.parent) == []


@by_document
def test_command_lines_parse(document: Path) -> None:
    assert [why for line in command_lines(document.read_text()) if (why := refused(line))] == []


@pytest.mark.parametrize("path", tree_paths(STRUCTURE.read_text()))
def test_what_the_tree_names_exists(path: str) -> None:
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_the_tree_names_every_part_of_the_package() -> None:
    parts = {
        f"lorafleet/{path.name}" + ("/" if path.is_dir() else "")
        for path in (ROOT / "lorafleet").iterdir()
        if path.name not in ("__init__.py", "py.typed", "__pycache__")
    }
    assert parts - set(tree_paths(STRUCTURE.read_text())) == set()


def test_every_exception_is_still_named_somewhere() -> None:
    named = set().union(*(named_paths(document.read_text()) for document in DOCUMENTS))
    assert NOT_OURS.keys() - named == set()


# That the checks find what is wrong


def test_a_dead_link_is_found() -> None:
    text = "[a](structure.md) [b](structure.md#who) [c](https://example.org/x) [d](#here) [e](gone.md) [f](../gone/)"
    assert dead_links(text, ROOT / "docs") == ["gone.md", "../gone/"]


def test_a_path_that_is_not_there_is_found() -> None:
    text = (
        "`docs/README.md`, `lorafleet/gone.py`, `scripts/gone lint`, `gone/`, `gone.toml`; but "
        "`scripts/check lint`, `constraints.txt`, "
        "`registry/`, `TENANT/ADAPTER`, `rules/NAME.py`, `HOST:PORT`, `W x + g B`, `timeout_s`, `rounds.run`.\n"
        "```sh\ncat `which gone/too.py`\n```\n"
    )
    assert missing_paths(text, ROOT / "docs") == [
        "docs/README.md",
        "gone.toml",
        "gone/",
        "lorafleet/gone.py",
        "scripts/gone",
    ]


def test_a_tree_is_read_level_by_level() -> None:
    text = "```\nlorafleet/\n  errors.py     the exceptions\n  a/            things\n    b.py c.py   two\nproto/\n```\n"
    assert tree_paths(text) == [
        "lorafleet/", "lorafleet/errors.py", "lorafleet/a/", "lorafleet/a/b.py", "lorafleet/a/c.py", "proto/",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lorafleet teach x", "teach"),
        ("lorafleet adapter burn x", "burn"),
        ("lorafleet --loud demo", "--loud"),
        ("lorafleet demo --fast", "--fast"),
        ("lorafleet tenant create acme --registry sqlite:///x.db", "--blobs"),
        ("lorafleet aggregate --rule exact --out x --rank many a b", "many"),
        ("lorafleet db check acme --registry sqlite:///x.db", "acme"),
    ],
)
def test_a_wrong_command_line_is_found(line: str, said: str) -> None:
    (found,) = command_lines(f"text\n\n```sh\nmake demo\n{line}   # a comment\n```\n")
    assert said in refused(found)


def test_right_command_lines_are_read_with_comments_and_continuations() -> None:
    block = "```sh\nlorafleet --debug demo --out x   # --gone\nlorafleet route 'a b' \\\n  --api-key k >said\n```\n"
    lines = command_lines(block + "lorafleet x\n")
    assert len(lines) == 2
    assert [refused(line) for line in lines] == ["", ""]
