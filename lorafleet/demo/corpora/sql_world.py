"""What the SQL grammar writes about: kinds of values, and themes with related tables."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words("""
    Ada Alan Amara Anna Aziz Barbara Bela Carlos Chen Clara Daniel Dora Edgar Elena Emmy Eva Farid Felix Grace
    Greta Hana Henri Ida Igor Ines Ivan Jana Jonas Juan Karl Kofi Lena Lin Lucia Maria Max Mei Mina Nadia Nina
    Noor Olga Omar Otto Paula Pedro Petra Rosa Ravi Sara Sofia Stefan Tomas Uma Vera Viktor Wei Yara Yusuf Zoe
""")
LAST_NAMES = _words("""
    Abbot Adler Baker Berg Bianchi Brandt Castro Costa Cruz Dahl Diaz Dubois Eriksen Fischer Fontaine Garcia
    Haas Hansen Ito Ivanov Jansen Kaya Keller Khan Kim Kovac Larsen Lopez Marino Meyer Moreau Nakamura Novak
    Okafor Olsen Park Patel Petrov Quinn Ricci Rossi Sato Schmidt Silva Singh Smith Suzuki Tanaka Torres Varga
    Vogel Wagner Weber Wong Yilmaz
""")
CITIES = _words("""
    Aarhus Accra Antwerp Athens Basel Bergen Bilbao Boston Bristol Busan Cairo Cork Dakar Denver Dresden
    Florence Geneva Ghent Graz Hanoi Havana Izmir Kyoto Lagos Leeds Lima Lisbon Lyon Malmo Nairobi Nice Oslo
    Osaka Porto Prague Quito Riga Seville Sofia Tampere Tbilisi Turin Utrecht Vienna Vilnius Zagreb Zurich
""")
COLOURS = _words("""
    amber azure black blue brown copper coral green grey ivory olive orange pink purple red silver teal white
""")
THINGS = _words("""
    anchor atlas basket beacon bell bottle bridge button cable candle carpet chair clock compass cup curtain
    desk drum engine feather filter frame garden glass hammer kettle ladder lamp lantern lens mirror needle
    notebook paddle pencil pillow pump ribbon rope saddle sail screen shelf spoon stove table tent tile valve
    wheel window
""")
TOPICS = _words("""
    access allergies arrival assembly billing cleaning contract cooling delivery documents fuel heating
    inspection insurance invoice keys labels lighting maintenance noise opening packaging parking password
    payment pressure quality refund repair safety schedule shipping software storage tickets training transport
    warranty water weather
""")
VERBS = _words("""
    asked cancelled checked confirmed delayed explained finished forgot missed moved ordered promised received
    renewed reported returned
""")


@dataclass(frozen=True)
class Column:
    name: str
    kind: str
    choices: tuple[str, ...] = ()
    """For ``choice``: the words; for numbers: the lowest and the highest."""
    optional: bool = False
    unique: bool = False


@dataclass(frozen=True)
class Kind:
    types: dict[str, str]
    """Dialect → column type."""
    draw: Callable[[random.Random, Column], str]
    """A literal as it stands in a statement."""
    numeric: bool = False
    ordered: bool = False
    choices: bool = False
    label: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    plural: str
    columns: tuple[Column, ...]
    parents: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return self.plural.replace("_", " ")


def _same(name: str) -> dict[str, str]:
    return dict.fromkeys(("PostgreSQL", "SQLite", "MySQL"), name)


def _range(column: Column, low: int, high: int) -> tuple[int, int]:
    return (int(column.choices[0]), int(column.choices[1])) if column.choices else (low, high)


def _day(rng: random.Random) -> str:
    return f"20{rng.randint(18, 26)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _email(rng: random.Random) -> str:
    first, last = rng.choice(FIRST_NAMES).lower(), rng.choice(LAST_NAMES).lower()
    return f"{first}.{last}@{rng.choice(['example.com', 'example.org', 'mail.example', 'post.example'])}"


def _sentence(rng: random.Random) -> str:
    who = rng.choice(["customer", "driver", "guest", "manager", "neighbour", "supplier", "team", "visitor"])
    return f"{who} {rng.choice(VERBS)} {rng.choice(['about', 'because of', 'without', 'after'])} {rng.choice(TOPICS)}"


KINDS: dict[str, Kind] = {
    "person": Kind(
        {"PostgreSQL": "TEXT", "SQLite": "TEXT", "MySQL": "VARCHAR(100)"},
        lambda rng, _: f"'{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}'",
        label=True,
    ),
    "thing": Kind(
        {"PostgreSQL": "TEXT", "SQLite": "TEXT", "MySQL": "VARCHAR(80)"},
        lambda rng, _: f"'{rng.choice(COLOURS)} {rng.choice(THINGS)}'",
        label=True,
    ),
    "place": Kind(
        {"PostgreSQL": "TEXT", "SQLite": "TEXT", "MySQL": "VARCHAR(80)"},
        lambda rng, _: f"'{rng.choice(CITIES)}'",
        label=True,
    ),
    "title": Kind(
        {"PostgreSQL": "VARCHAR(200)", "SQLite": "TEXT", "MySQL": "VARCHAR(200)"},
        lambda rng, _: f"'The {rng.choice(COLOURS)} {rng.choice(THINGS)} of {rng.choice(CITIES)}'",
        label=True,
    ),
    "topic": Kind(
        {"PostgreSQL": "TEXT", "SQLite": "TEXT", "MySQL": "VARCHAR(120)"},
        lambda rng, _: f"'{rng.choice(TOPICS)} and {rng.choice(TOPICS)}'",
        label=True,
    ),
    "text": Kind(_same("TEXT"), lambda rng, _: f"'{_sentence(rng)}'"),
    "email": Kind({"PostgreSQL": "TEXT", "SQLite": "TEXT", "MySQL": "VARCHAR(120)"}, lambda rng, _: f"'{_email(rng)}'"),
    "code": Kind(
        {"PostgreSQL": "CHAR(7)", "SQLite": "TEXT", "MySQL": "CHAR(7)"},
        lambda rng, _: f"'{''.join(rng.choices('ABCDEFGHKLMNPRSTUVWXYZ', k=2))}-{rng.randint(1000, 9999)}'",
    ),
    "money": Kind(
        {"PostgreSQL": "NUMERIC(10, 2)", "SQLite": "REAL", "MySQL": "DECIMAL(10, 2)"},
        lambda rng, c: f"{rng.randint(*_range(c, 2, 900))}.{rng.choice(['00', '50', '90', '95', '25'])}",
        numeric=True,
    ),
    "count": Kind(_same("INTEGER"), lambda rng, c: str(rng.randint(*_range(c, 1, 40))), numeric=True),
    "score": Kind(
        {"PostgreSQL": "DOUBLE PRECISION", "SQLite": "REAL", "MySQL": "DOUBLE"},
        lambda rng, c: f"{rng.randint(*_range(c, 0, 9))}.{rng.randint(0, 9)}",
        numeric=True,
    ),
    "date": Kind(
        {"PostgreSQL": "DATE", "SQLite": "TEXT", "MySQL": "DATE"}, lambda rng, _: f"'{_day(rng)}'", ordered=True
    ),
    "timestamp": Kind(
        {"PostgreSQL": "TIMESTAMPTZ", "SQLite": "TEXT", "MySQL": "DATETIME"},
        lambda rng, _: f"'{_day(rng)} {rng.randint(6, 21):02}:{rng.choice(['00', '15', '30', '45'])}:00'",
        ordered=True,
    ),
    "choice": Kind(
        {"PostgreSQL": "TEXT", "SQLite": "TEXT", "MySQL": "VARCHAR(20)"},
        lambda rng, c: f"'{rng.choice(c.choices)}'",
        choices=True,
    ),
}


# Theme, then its tables, parents before their children. A table is ``name/plural of parents: columns``; a column is a
# name, a kind (``?`` optional, ``!`` unique), and for some kinds the words or the lowest and the highest value.
_THEMES = """
An online shop
  customer/customers: full_name person, email email!, city place?, joined_on date
  product/products: title thing, sku code!, price money, stock count, colour choice? red|blue|black|white
  purchase/purchases of customer: ordered_at timestamp, status choice open|paid|shipped|returned, note text?
  purchase_item/purchase_items of purchase product: quantity count 1|6, unit_price money, discount score? 0|3
  review/reviews of product customer: rating count 1|5, body text, written_on date

A public library
  author/authors: full_name person, country place?, born_on date?
  book/books of author: title title, isbn code!, pages count 80|900, published_on date
  reader/readers: full_name person, email email!, member_since date, category choice child|student|adult
  loan/loans of book reader: lent_on date, due_on date, returned_on date?, fine money? 0|20
  reservation/reservations of book reader: requested_at timestamp, state choice waiting|ready|expired

A clinic
  doctor/doctors: full_name person, specialty choice surgery|cardiology|paediatrics|radiology, room count 1|60
  patient/patients: full_name person, born_on date, city place, allergy topic?
  appointment/appointments of doctor patient: starts_at timestamp, minutes count 10|60, state choice
      booked|done|missed
  prescription/prescriptions of appointment: medicine thing, dose_mg count 5|500, days count 1|30, remark text?
  invoice/invoices of appointment: amount money, issued_on date, paid_on date?

A railway
  station/stations: city place, code code!, platforms count 1|24, opened_on date?
  train/trains: nickname thing, seats count 60|800, top_speed count 80|320, operator person?
  journey/journeys of train station: departs_at timestamp, arrives_at timestamp, delay_minutes count? 0|90
  ticket/tickets of journey: passenger person, price money, class choice first|second, seat count 1|120
  incident/incidents of journey: description text, severity choice minor|major|critical, closed_at timestamp?

A university
  department/departments: label topic, building thing, budget money 1000|90000
  teacher/teachers of department: full_name person, email email!, hired_on date, salary money 2000|7000
  course/courses of teacher: title topic, credits count 2|12, term choice spring|autumn, language choice?
      english|german|spanish
  student/students: full_name person, enrolled_on date, city place?
  enrolment/enrolments of course student: grade score? 1|9, attempts count 1|3, passed choice yes|no

A farm
  field/fields: nickname thing, hectares score 1|40, soil choice clay|sand|loam
  crop/crops of field: variety thing, sown_on date, expected_yield score 1|90
  worker/workers: full_name person, hourly_wage money 12|30, started_on date
  harvest/harvests of crop worker: collected_on date, tonnes score, moisture score? 1|20, remark text?
  sale/sales of harvest: buyer person, tonnes score, price_per_tonne money, sold_on date

A weather network
  region/regions: label place, altitude count 0|2500
  sensor/sensors of region: serial code!, model thing, installed_on date, status choice active|faulty|retired
  measurement/measurements of sensor: taken_at timestamp, temperature score 0|38, humidity count 10|100, wind_speed
      score? 0|30
  warning/warnings of region: issued_at timestamp, level choice yellow|orange|red, message text

A music archive
  artist/artists: full_name person, home_town place?, active_since date
  album/albums of artist: title title, released_on date, label thing?, copies count 100|90000
  track/tracks of album: title topic, seconds count 60|600, tempo count 60|180
  listener/listeners: email email!, joined_on date, plan choice free|family|premium
  play/plays of track listener: played_at timestamp, device choice phone|desktop|speaker, skipped choice yes|no

A software project
  developer/developers: full_name person, email email!, time_zone place?
  component/components of developer: label thing, lines_of_code count 200|90000, criticality choice low|medium|high
  ticket/tickets of component developer: summary text, kind choice bug|feature|task, priority count 1|5, opened_at
      timestamp, closed_at timestamp?
  version/versions of component: tag code!, released_on date, downloads count 10|50000
  build_run/build_runs of version: started_at timestamp, seconds count 20|3600, result choice
      passed|failed|cancelled

A hotel
  guest/guests: full_name person, email email!, city place?, vip choice yes|no
  room/rooms: number count! 100|699, beds count 1|4, nightly_rate money 60|400, view choice? sea|garden|street
  booking/bookings of guest room: arrives_on date, leaves_on date, guests count 1|4, state choice
      confirmed|cancelled|completed
  extra/extras of booking: item thing, price money, ordered_at timestamp
  complaint/complaints of booking: subject topic, body text, solved_on date?

A warehouse
  supplier/suppliers: company person, city place, rating score 1|9
  article/articles of supplier: label thing, sku code!, weight_kg score 0|60, reorder_level count 5|200
  bin/bins: aisle code, shelf count 1|12, capacity count 20|900
  stock_level/stock_levels of article bin: quantity count 0|500, counted_on date
  shipment/shipments of article: carrier thing, sent_at timestamp, pallets count 1|30, state choice
      packed|sent|lost|delivered

An energy supplier
  household/households: owner_name person, city place, residents count 1|7
  meter/meters of household: serial code!, kind choice power|gas|water, installed_on date
  reading/readings of meter: read_on date, consumption score 1|90, estimated choice yes|no
  tariff/tariffs: label topic, unit_price money 1|9, valid_from date, valid_until date?
  bill/bills of household tariff: amount money 20|400, issued_on date, paid_on date?
"""


def _parse(text: str) -> dict[str, tuple[Table, ...]]:
    themes: dict[str, tuple[Table, ...]] = {}
    for block in text.strip().split("\n\n"):
        theme, _, body = block.partition("\n")
        # A line indented further continues the table above it.
        themes[theme] = tuple(map(_table, body.replace("\n      ", " ").splitlines()))
    return themes


def _table(line: str) -> Table:
    head, _, body = line.strip().partition(": ")
    names, _, parents = head.partition(" of ")
    name, _, plural = names.partition("/")
    return Table(name, plural, tuple(map(_column, body.split(", "))), tuple(parents.split()))


def _column(text: str) -> Column:
    name, kind, *rest = text.split()
    choices = tuple(rest[0].split("|")) if rest else ()
    return Column(name, kind.rstrip("?!"), choices, optional=kind.endswith("?"), unique=kind.endswith("!"))


THEMES = _parse(_THEMES)
