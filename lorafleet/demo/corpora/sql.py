"""A seeded grammar that writes database scripts: a language of its own, with names that stay consistent.

A script invents one organisation's database: it draws a theme, a dialect and a style, creates related tables, fills
them with rows whose foreign keys exist, and then works with them (reports, joins, windows, updates, views,
transactions), each statement under a comment that says what it is for. A pure function of (seed, number).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lorafleet.demo.corpora.sql_database import Database
from lorafleet.demo.corpora.sql_world import KINDS

# Aggregates with the words for the comment.
AGGREGATES = {"SUM": "total", "AVG": "average", "MAX": "largest", "MIN": "smallest"}


def sql_script(seed: int, number: int) -> str:
    """One script of about 3 to 9 kB."""
    db = Database(random.Random(f"{seed}/sql/{number}"))
    parts = [db.title()]
    parts += [db.create(table) for table in db.tables]
    parts += [db.insert(table) for table in db.tables]
    statements = db.rng.choices(list(STATEMENTS), list(STATEMENTS.values()), k=db.rng.randint(12, 22))
    parts += [write(db) for write in statements]
    return "\n".join(part for part in parts if part)


def _filter(db: Database) -> str:
    kw, table = db.style.words, db.rng.choice(db.tables)
    chosen = db.rng.sample(db.columns[table], k=min(len(db.columns[table]), db.rng.randint(2, 3)))
    condition, words = db.condition(table)
    second, more = db.condition(table)
    both = db.rng.random() < 0.4 and second.split(" ")[0] != condition.split(" ")[0]
    order = db.rng.choice(chosen).name
    direction = db.rng.choice(["", " DESC"])
    limit = db.rng.choice(["", "", "LIMIT 5", "LIMIT 10", "LIMIT 20"])
    return db.comment(f"{table.words} with {words}" + (f" and {more}" if both else "")) + db.clauses(
        kw("SELECT ") + ", ".join(column.name for column in chosen),
        kw("FROM ") + db.name(table),
        kw("WHERE ") + condition + (f"\n{db.style.indent}" + kw("AND ") + second if both else ""),
        kw("ORDER BY ") + order + kw(direction),
        kw(limit),
    )


def _join(db: Database) -> str:
    kw = db.style.words
    child, parent = db.with_parent()
    c, p = db.alias(child), db.alias(parent)
    condition, words = db.condition(child, f"{c}.")
    shown = db.rng.choice(db.columns[child])
    grand = db.parents(parent)
    joins = [kw("JOIN ") + f"{db.name(parent)} {p} " + kw("ON ") + f"{p}.id = {c}.{parent.name}_id"]
    columns = [f"{c}.id", f"{c}.{shown.name}", f"{p}.{db.label(parent).name}" + kw(" AS ") + parent.name]
    if grand and db.rng.random() < 0.6:
        top = db.rng.choice(grand)
        t = db.alias(top)
        joins.append(kw("JOIN ") + f"{db.name(top)} {t} " + kw("ON ") + f"{t}.id = {p}.{top.name}_id")
        columns.append(f"{t}.{db.label(top).name}" + kw(" AS ") + top.name)
    return db.comment(f"each of the {child.words} with {words}, and its {parent.name.replace('_', ' ')}") + db.clauses(
        kw("SELECT ") + ", ".join(columns),
        kw("FROM ") + f"{db.name(child)} {c}",
        *joins,
        kw("WHERE ") + condition,
        kw("ORDER BY ") + f"{p}.{db.label(parent).name}, {c}.id",
    )


def _group(db: Database) -> str:
    kw = db.style.words
    child, parent = db.with_parent()
    c, p = db.alias(child), db.alias(parent)
    measure = db.of_kind(child, lambda kind: kind.numeric)
    name = db.label(parent).name
    if measure is None:
        value, alias, words = kw("COUNT(*)"), f"{child.name}_count", f"number of {child.words}"
    else:
        function = db.rng.choice(list(AGGREGATES))
        alias = f"{AGGREGATES[function]}_{measure.name}"
        value = kw(function) + f"({c}.{measure.name})"
        words = f"{AGGREGATES[function]} {measure.name.replace('_', ' ')} of {child.words}"
    having = kw("HAVING COUNT(*) > ") + str(db.rng.randint(1, 3)) if db.rng.random() < 0.4 else ""
    return db.comment(f"{words} by {parent.name.replace('_', ' ')}") + db.clauses(
        kw("SELECT ") + f"{p}.{name}, {value} " + kw("AS ") + alias,
        kw("FROM ") + f"{db.name(parent)} {p}",
        kw("LEFT JOIN " if not having else "JOIN ")
        + f"{db.name(child)} {c} "
        + kw("ON ")
        + f"{c}.{parent.name}_id = {p}.id",
        kw("GROUP BY ") + f"{p}.id, {p}.{name}",
        having,
        kw("ORDER BY ") + f"{alias}" + kw(" DESC"),
    )


def _cte(db: Database) -> str:
    kw, i = db.style.words, db.style.indent
    child, parent = db.with_parent()
    p, label = db.alias(parent), db.label(parent).name
    condition, words = db.condition(child)
    name = db.rng.choice(["recent", "selected", "active", "counted", "chosen"]) + f"_{child.plural}"
    least = db.rng.randint(1, 3)
    return db.comment(f"{parent.words} with at least {least} {child.words} of {words}") + db.clauses(
        kw("WITH ") + name + kw(" AS ("),
        i + kw("SELECT ") + f"{parent.name}_id, " + kw("COUNT(*) AS ") + "n",
        i + kw("FROM ") + db.name(child),
        i + kw("WHERE ") + condition,
        i + kw("GROUP BY ") + f"{parent.name}_id",
        ")",
        kw("SELECT ") + f"{p}.{label}, {name}.n",
        kw("FROM ") + name,
        kw("JOIN ") + f"{db.name(parent)} {p} " + kw("ON ") + f"{p}.id = {name}.{parent.name}_id",
        kw("WHERE ") + f"{name}.n >= {least}",
        kw("ORDER BY ") + f"{name}.n" + kw(" DESC, ") + f"{p}.{label}",
    )


def _window(db: Database) -> str:
    kw, i = db.style.words, db.style.indent
    table, measure = db.numeric_table()
    parents = db.parents(table)
    by = f"{parents[0].name}_id" if parents else db.label(table).name
    function, words = db.rng.choice(
        [("RANK() OVER", "standing"), ("ROW_NUMBER() OVER", "position"), (f"SUM({measure.name}) OVER", "running total"),
         (f"LAG({measure.name}) OVER", "previous value"), (f"AVG({measure.name}) OVER", "moving average")]
    )  # fmt: skip
    function = function.replace(function.partition("(")[0], kw(function.partition("(")[0])).replace(
        " OVER", kw(" OVER")
    )
    order = measure.name + kw(" DESC") if words in ("standing", "position") else "id"
    return db.comment(f"{words} of {measure.name.replace('_', ' ')} within each {by.removesuffix('_id')}") + db.clauses(
        kw("SELECT ") + f"id, {by}, {measure.name},",
        f"{i}{function} ("
        + kw("PARTITION BY ")
        + by
        + kw(" ORDER BY ")
        + f"{order}) "
        + kw("AS ")
        + words.replace(" ", "_"),
        kw("FROM ") + db.name(table),
        kw("ORDER BY ") + f"{by}, {words.replace(' ', '_')}",
    )


def _missing(db: Database) -> str:
    kw, i = db.style.words, db.style.indent
    child, parent = db.with_parent()
    p, c = db.alias(parent), db.alias(child)
    condition, words = db.condition(child, f"{c}.")
    return db.comment(f"{parent.words} without any {child.words} of {words}") + db.clauses(
        kw("SELECT ") + f"{p}.id, {p}.{db.label(parent).name}",
        kw("FROM ") + f"{db.name(parent)} {p}",
        kw("WHERE NOT EXISTS ("),
        i + kw("SELECT ") + "1 " + kw("FROM ") + f"{db.name(child)} {c}",
        i + kw("WHERE ") + f"{c}.{parent.name}_id = {p}.id " + kw("AND ") + condition,
        ")",
    )


def _update(db: Database) -> str:
    kw = db.style.words
    table = db.rng.choice(db.tables)
    column = db.rng.choice(db.columns[table])
    if KINDS[column.kind].numeric and db.rng.random() < 0.7:
        factor = db.rng.choice(["1.05", "1.1", "0.9", "0.95", "2"])
        value, words = f"{column.name} * {factor}", f"change {column.name.replace('_', ' ')} by a factor of {factor}"
    else:
        value = db.draw(table, column)
        words = f"set {column.name.replace('_', ' ')} to {value}"
    where = f"id = {db.rng.randint(1, db.rows[table.name])}"
    said = f"{table.name.replace('_', ' ')} {where.rpartition(' ')[2]}"
    if not column.unique and db.rng.random() < 0.5:
        where, told = db.condition(table)
        said = f"{table.words} with {told}"
    return db.comment(f"{words} for {said}") + db.clauses(
        kw("UPDATE ") + db.name(table), kw("SET ") + f"{column.name} = {value}", kw("WHERE ") + where
    )


def _delete(db: Database) -> str:
    kw, table = db.style.words, db.tables[-1]
    condition, words = db.condition(table)
    return db.comment(f"remove {table.words} with {words}") + db.clauses(
        kw("DELETE FROM ") + db.name(table), kw("WHERE ") + condition
    )


def _view(db: Database) -> str:
    kw = db.style.words
    child, parent = db.with_parent()
    c, p = db.alias(child), db.alias(parent)
    name = f"{parent.name}_{db.rng.choice(['overview', 'summary', 'report', 'statistics'])}"
    if not db.is_new(name):
        return ""
    measure = db.of_kind(child, lambda kind: kind.numeric)
    extra = f", {kw('SUM')}({c}.{measure.name})" + kw(" AS ") + f"total_{measure.name}" if measure else ""
    return db.comment(f"a view with one line for each {parent.name.replace('_', ' ')}") + db.clauses(
        kw("CREATE VIEW ") + name + kw(" AS"),
        kw("SELECT ")
        + f"{p}.id, {p}.{db.label(parent).name}, "
        + kw("COUNT(")
        + f"{c}.id) "
        + kw("AS ")
        + child.plural
        + extra,
        kw("FROM ") + f"{db.name(parent)} {p}",
        kw("LEFT JOIN ") + f"{db.name(child)} {c} " + kw("ON ") + f"{c}.{parent.name}_id = {p}.id",
        kw("GROUP BY ") + f"{p}.id, {p}.{db.label(parent).name}",
    )


def _transaction(db: Database) -> str:
    kw = db.style.words
    begin = "START TRANSACTION;" if db.style.dialect == "MySQL" else "BEGIN;"
    body = "".join(part(db) for part in db.rng.choices([_insert_one, _update], k=db.rng.randint(2, 3)))
    return f"{kw(begin)}\n{body}{kw('COMMIT;')}\n"


def _insert_one(db: Database) -> str:
    kw, table = db.style.words, db.rng.choice(db.tables)
    parents = db.parents(table)
    names = [f"{parent.name}_id" for parent in parents] + [column.name for column in db.columns[table]]
    cells = [str(db.rng.randint(1, db.rows[parent.name])) for parent in parents]
    cells += [db.draw(table, column) for column in db.columns[table]]
    db.rows[table.name] += 1
    said = db.comment(f"a new {table.name.replace('_', ' ')}")
    return said + db.clauses(
        kw("INSERT INTO ") + f"{db.name(table)} ({', '.join(names)})", kw("VALUES ") + f"({', '.join(cells)})"
    )


def _index(db: Database) -> str:
    kw, table = db.style.words, db.rng.choice(db.tables)
    column = db.rng.choice(db.columns[table])
    if not db.is_new(f"idx_{table.name}_{column.name}"):
        return ""
    partial = ""
    if column.optional and db.style.dialect != "MySQL":
        partial = kw(" WHERE ") + column.name + kw(" IS NOT NULL")
    unique = "UNIQUE " if column.unique else ""
    return (
        db.comment(f"{table.words} are often looked up by {column.name.replace('_', ' ')}")
        + kw(f"CREATE {unique}INDEX ")
        + f"idx_{table.name}_{column.name}"
        + kw(" ON ")
        + f"{db.name(table)} ({column.name}){partial};\n"
    )


def _case(db: Database) -> str:
    kw, i = db.style.words, db.style.indent
    table, measure = db.numeric_table()
    seen = sorted(set(db.values[table.name, measure.name]), key=float)
    if len(seen) < 2:
        return ""
    low, high = sorted(db.rng.sample(seen, 2), key=float)
    small, middle, large = db.rng.choice([("low", "medium", "high"), ("small", "usual", "large"), ("C", "B", "A")])
    return db.comment(f"{table.words} in three classes of {measure.name.replace('_', ' ')}") + db.clauses(
        kw("SELECT CASE"),
        i + kw("WHEN ") + f"{measure.name} < {low} " + kw("THEN ") + f"'{small}'",
        i + kw("WHEN ") + f"{measure.name} < {high} " + kw("THEN ") + f"'{middle}'",
        i + kw("ELSE ") + f"'{large}'",
        kw("END AS ") + f"{measure.name}_class, " + kw("COUNT(*) AS ") + table.plural,
        kw("FROM ") + db.name(table),
        kw("GROUP BY ") + f"{measure.name}_class",
    )


def _scalar(db: Database) -> str:
    kw, i = db.style.words, db.style.indent
    table, measure = db.numeric_table()
    function = db.rng.choice(["AVG", "MAX", "MIN"])
    operator = {"AVG": db.rng.choice([">", "<"]), "MAX": "=", "MIN": "="}[function]
    said = {">": "above", "<": "below", "=": "equal to"}[operator]
    words = f"{table.words} whose {measure.name.replace('_', ' ')} is {said} the {AGGREGATES[function]}"
    return db.comment(words) + db.clauses(
        kw("SELECT ") + f"id, {db.label(table).name}, {measure.name}",
        kw("FROM ") + db.name(table),
        kw("WHERE ") + f"{measure.name} {operator} (",
        i + kw(f"SELECT {function}(") + measure.name + kw(") FROM ") + db.name(table),
        ")",
    )


def _alter(db: Database) -> str:
    kw, table = db.style.words, db.rng.choice(db.tables)
    name, kind = db.rng.choice(
        [("archived_at", "timestamp"), ("remarks", "text"), ("reviewed_on", "date"), ("urgency", "count")]
    )
    if not db.is_new(f"{table.name}.{name}"):
        return ""
    return db.comment(f"{table.words} get an optional {name.replace('_', ' ')}") + (
        kw("ALTER TABLE ") + db.name(table) + kw(" ADD COLUMN ") + f"{name} {db.type(KINDS[kind])};\n"
    )


# How often each kind of statement comes.
STATEMENTS: dict[Callable[[Database], str], int] = {
    _filter: 5, _join: 5, _group: 5, _cte: 3, _window: 3, _missing: 2, _update: 3, _delete: 1,
    _view: 2, _transaction: 2, _index: 2, _case: 3, _scalar: 2, _alter: 1,
}  # fmt: skip
