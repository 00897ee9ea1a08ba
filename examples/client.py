"""A data owner joins a federation with a folder of texts.

    python examples/client.py HOST:PORT MEMBER FOLDER [CA_CERTIFICATE]

FOLDER holds *.txt files; a tenth of them never trains and only evaluates. Where it has train/ and held_out/, those
count. Without a certificate the connection is plain text: for a SuperLink on this machine.
"""

import sys
from pathlib import Path

from lorafleet.clients.join import join

if __name__ == "__main__":
    superlink, member, folder, *certificate = sys.argv[1:]
    root = Path(certificate[0]) if certificate else None
    join(superlink, data=folder, member=member, rank=8, insecure=root is None, root_certificates=root)
