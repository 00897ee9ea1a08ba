"""The state of one database script: its style, its tables, and what has been inserted so far."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from lorafleet.demo.corpora.sql_world import KINDS, THEMES, Column, Kind, Table


@dataclass(frozen=True)
class Style:
    dialect: str
    upper: bool
    indent: str
    plural: bool

    def words(self, text: str) -> str:
        """Keywords in the script's case."""
        return text if self.upper else text.lower()


class Database:
    """One invented database; every draw comes from ``rng``, in order."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.style = Style(
            dialect=rng.choice(["PostgreSQL", "PostgreSQL", "SQLite", "MySQL"]),
            upper=rng.random() < 0.8,
            indent=rng.choice(["  ", "    "]),
            plural=rng.random() < 0.7,
        )
        self.theme, tables = rng.choice(list(THEMES.items()))
        # A table whose parent was left out would refer to nothing: drop from the end, where the children are.
        self.tables = tables[: rng.randint(max(2, len(tables) - 2), len(tables))]
        self.columns = {table: self.choose_columns(table) for table in self.tables}
        self.rows: dict[str, int] = {}
        self.values: dict[tuple[str, str], list[str]] = {}
        self.created: set[str] = set()

    def choose_columns(self, table: Table) -> list[Column]:
        """The table's own columns, some optional ones left out, in their order."""
        return [column for column in table.columns if not column.optional or self.rng.random() < 0.6]

    def name(self, table: Table) -> str:
        return table.plural if self.style.plural else table.name

    def alias(self, table: Table) -> str:
        """Initials of the table's words; the second letter too where another table has the same."""
        initials = "".join(word[0] for word in table.name.split("_"))
        twins = [t for t in self.tables if "".join(w[0] for w in t.name.split("_")) == initials]
        return initials if twins[0] is table else table.name[:3]

    def parents(self, table: Table) -> list[Table]:
        return [parent for parent in self.tables if parent.name in table.parents]

    def with_parent(self) -> tuple[Table, Table]:
        return self.rng.choice([(child, parent) for child in self.tables for parent in self.parents(child)])

    def of_kind(self, table: Table, test: Callable[[Kind], bool]) -> Column | None:
        """A random column of the table whose kind passes the test."""
        fitting = [column for column in self.columns[table] if test(KINDS[column.kind])]
        return self.rng.choice(fitting) if fitting else None

    def label(self, table: Table) -> Column:
        """The column that a reader would call the row by."""
        return next((c for c in self.columns[table] if KINDS[c.kind].label), self.columns[table][0])

    def numeric_table(self) -> tuple[Table, Column]:
        fitting = [(t, c) for t in self.tables for c in self.columns[t] if KINDS[c.kind].numeric]
        return self.rng.choice(fitting)

    def draw(self, table: Table, column: Column) -> str:
        """A literal for a column, from now on known as one of its values; unique where the column is."""
        known = self.values.setdefault((table.name, column.name), [])
        value = KINDS[column.kind].draw(self.rng, column)
        while column.unique and value in known:
            value = KINDS[column.kind].draw(self.rng, column)
        known.append(value)
        return value

    def condition(self, table: Table, prefix: str = "") -> tuple[str, str]:
        """(SQL, words) of a condition on one column, with values that occur in its rows."""
        kw, rng = self.style.words, self.rng
        column = rng.choice(self.columns[table])
        kind, name = KINDS[column.kind], prefix + column.name
        seen = self.values[table.name, column.name]
        value = rng.choice(seen)
        words = column.name.replace("_", " ")
        if kind.numeric:
            operator, said = rng.choice([(">", "above"), (">=", "of at least"), ("<", "below"), ("<=", "of at most")])
            return f"{name} {operator} {value}", f"{words} {said} {value}"
        if kind.ordered:
            if rng.random() < 0.4:
                low, high = sorted((value, rng.choice(seen)))
                return kw(f"{name} BETWEEN") + f" {low} " + kw("AND") + f" {high}", f"{words} from {low} to {high}"
            return f"{name} >= {value}", f"{words} since {value}"
        if kind.choices and rng.random() < 0.5:
            several = sorted(set(rng.choices(seen, k=3)))
            if len(several) > 1:
                return f"{name} " + kw("IN") + f" ({', '.join(several)})", f"{words} among {', '.join(several)}"
        if column.optional and rng.random() < 0.4:
            return f"{name} " + kw("IS NOT NULL"), f"a known {words}"
        if kind.label and rng.random() < 0.5:
            start = value.strip("'").split(" ")[0]
            return f"{name} " + kw("LIKE") + f" '{start}%'", f"{words} starting with {start}"
        return f"{name} = {value}", f"{words} {value}"

    def clauses(self, *clauses: str) -> str:
        """A statement with one clause a line; keywords are in the script's case already."""
        return "\n".join(clause for clause in clauses if clause) + ";\n"

    def is_new(self, name: str) -> bool:
        """Whether no statement made an index, view or column of this name yet; from now on one did."""
        new = name not in self.created
        self.created.add(name)
        return new

    def comment(self, text: str) -> str:
        return f"-- {text[0].upper()}{text[1:]}\n"

    def title(self) -> str:
        return f"-- {self.theme} ({self.style.dialect})\n-- Tables: {', '.join(map(self.name, self.tables))}\n"

    def type(self, kind: Kind) -> str:
        return self.style.words(kind.types[self.style.dialect])

    def create(self, table: Table) -> str:
        kw = self.style.words
        key = {
            "PostgreSQL": "id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
            "SQLite": "id INTEGER PRIMARY KEY AUTOINCREMENT",
            "MySQL": "id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY",
        }[self.style.dialect]
        lines = ["id " + kw(key[3:])]
        for parent in self.parents(table):
            number = {"PostgreSQL": "BIGINT", "SQLite": "INTEGER", "MySQL": "INT UNSIGNED"}[self.style.dialect]
            refers = self.rng.choice(["", " ON DELETE CASCADE"]) if parent.name != table.name else ""
            lines.append(
                f"{parent.name}_id " + kw(f"{number} NOT NULL REFERENCES") + f" {self.name(parent)} (id)" + kw(refers)
            )
        for column in self.columns[table]:
            kind = KINDS[column.kind]
            line = f"{column.name} {self.type(kind)}" + ("" if column.optional else kw(" NOT NULL"))
            if column.unique:
                line += kw(" UNIQUE")
            elif kind.choices and self.rng.random() < 0.6:
                allowed = ", ".join(f"'{choice}'" for choice in column.choices)
                line += kw(" CHECK (") + column.name + kw(" IN (") + allowed + "))"
            elif kind.numeric and self.rng.random() < 0.4:
                line += kw(" CHECK (") + f"{column.name} >= 0)"
            lines.append(line)
        inside = f",\n{self.style.indent}".join(lines)
        return kw("CREATE TABLE") + f" {self.name(table)} (\n{self.style.indent}{inside}\n);\n"

    def insert(self, table: Table) -> str:
        kw = self.style.words
        count = self.rng.randint(4, 9)
        parents = self.parents(table)
        names = [f"{parent.name}_id" for parent in parents] + [column.name for column in self.columns[table]]
        rows = []
        for number in range(count):
            cells = [str(self.rng.randint(1, self.rows[parent.name])) for parent in parents]
            for column in self.columns[table]:
                if column.optional and self.rng.random() < 0.15 and number:
                    cells.append(kw("NULL"))
                    continue
                cells.append(self.draw(table, column))
            rows.append(f"({', '.join(cells)})")
        self.rows[table.name] = count
        body = f",\n{self.style.indent}".join(rows)
        head = kw("INSERT INTO") + f" {self.name(table)} ({', '.join(names)}) " + kw("VALUES")
        return f"{head}\n{self.style.indent}{body};\n"
