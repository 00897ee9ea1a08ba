"""A tenant brings an adapter of its own to a server and says that it is the one to use.

FOLDER is in PEFT's format; its README.md becomes the model card. The API key, with the scopes adapters:read and
adapters:write, is in the environment as LORAFLEET_API_KEY. Without a certificate the connection is plain text: for a
server on this machine. A version that replaces another one has to be measured to be better: give LOSS and TOKENS.
"""

import argparse
import os
import sys
from pathlib import Path

from lorafleet.adapters_client import AdapterClient
from lorafleet.api_client import ClientTls
from lorafleet.errors import LorafleetError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", metavar="HOST:PORT", help="its gRPC address")
    parser.add_argument("name", metavar="TENANT/ADAPTER", help="the name that it gets")
    parser.add_argument("folder", metavar="FOLDER", help="the adapter")
    parser.add_argument("--certificate", metavar="FILE", type=Path, help="of the authority that checks the server")
    parser.add_argument("--loss", type=float, help="that you measured, in nats per token")
    parser.add_argument("--tokens", type=int, default=1, help="over so many held-out tokens")
    said = parser.parse_args()
    key = os.environ.get("LORAFLEET_API_KEY", "")
    tls = None if said.certificate is None else ClientTls(authority=said.certificate)
    with AdapterClient(said.server, key=key, tls=tls) as client:
        version = client.upload(said.name, said.folder)
        if said.loss is not None:
            client.evaluate(version.reference, loss=said.loss, tokens=said.tokens)
        client.promote(version.reference)
    print(f"{version.reference} ({version.digest}) is the champion")


if __name__ == "__main__":
    try:
        main()
    except LorafleetError as error:
        sys.exit(f"error: {error}")
