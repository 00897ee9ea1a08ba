"""A data owner joins with a dataset of its own: anything with __len__ and __getitem__ that gives texts.

python examples/custom_dataset.py HOST:PORT MEMBER support.sqlite [CA_CERTIFICATE]
"""

import sqlite3
import sys
from pathlib import Path

from lorafleet.clients.join import join


class Tickets:
    """Solved support tickets of one database, question and answer as one text."""

    def __init__(self, database: str) -> None:
        uri = f"{Path(database).resolve().as_uri()}?mode=ro"
        with sqlite3.connect(uri, uri=True) as connection:
            self.rows = connection.execute("SELECT question, answer FROM tickets WHERE solved ORDER BY id").fetchall()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        question, answer = self.rows[index]
        return {"text": f"Question: {question}\nAnswer: {answer}\n"}


if __name__ == "__main__":
    superlink, member, database, *certificate = sys.argv[1:]
    root = Path(certificate[0]) if certificate else None
    join(superlink, data=Tickets(database), member=member, rank=16, insecure=root is None, root_certificates=root)
