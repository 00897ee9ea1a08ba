"""A data owner joins with a dataset of its own: anything with __len__ and __getitem__ that gives texts.

    cd examples && python custom_dataset.py HOST:PORT MEMBER support.sqlite

Flower runs every task in a process of its own, so the dataset is named (module:name) and not passed as an object.
"""

import os
import sqlite3
import sys

from lorafleet.clients.join import join


class Tickets:
    """Solved support tickets of one database, question and answer as one text."""

    def __init__(self) -> None:
        with sqlite3.connect(f"file:{os.environ['TICKETS_DATABASE']}?mode=ro", uri=True) as database:
            self.rows = database.execute("SELECT question, answer FROM tickets WHERE solved ORDER BY id").fetchall()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        question, answer = self.rows[index]
        return {"text": f"Question: {question}\nAnswer: {answer}\n"}


if __name__ == "__main__":
    superlink, member, database = sys.argv[1:]
    os.environ["TICKETS_DATABASE"] = os.path.abspath(database)
    join(superlink, data="custom_dataset:Tickets", member=member, rank=16, insecure=True)
