"""Whether a federation still takes this member's node: asked where its SuperNode has ended after it was connected.

A SuperNode ends alike whether its SuperLink was restarted or its member was put out. The proxy before the SuperLink
tells the difference, to whoever names a key: it answers the begin of a node, ``register-node``, with 412 where the key
is no member's (:mod:`lorafleet.coordinator.fleet_proxy`). Both ways to that, a member that is revoked and a federation
that is stopped, are for good, so that trying again has no end.
"""

from __future__ import annotations

import base64
import http.client
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

PATH = "/v1/fleet/register-node"
NO_MEMBER = 412
TIMEOUT_S = 5.0


def is_out(superlink: str, private_key: Path, root_certificates: Path | None) -> bool:
    """Whether the proxy at ``HOST:PORT`` says that the key is no member's; False where it says nothing of the kind.

    What is sent is the public key, as the SuperNode sends it with every call.
    """
    host, _, port = superlink.rpartition(":")
    try:
        trust = ssl.create_default_context(cafile=None if root_certificates is None else str(root_certificates))
        connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=TIMEOUT_S, context=trust)
        try:
            connection.request("POST", PATH, b"", {"flwr-public-key": _header(private_key)})
            return connection.getresponse().status == NO_MEMBER
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        log.debug("%s does not say whether this node is a member's: %s", superlink, error)
        return False


def _header(private_key: Path) -> str:
    """The public key of a private one as Flower's calls carry it; ValueError where the file holds none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    try:
        public = load_ssh_private_key(private_key.read_bytes(), password=None).public_key()
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{private_key} is no private key that Flower takes ({error})") from None
    return base64.b64encode(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()
