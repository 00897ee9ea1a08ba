"""Whom an address on the network stands for, where strangers share a few places."""

from __future__ import annotations

import ipaddress


def origin(host: str) -> str:
    """Its network: of IPv4 the address itself, of IPv6 the 64 bits that one subscriber has; what is none as it is."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 6:
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        address = address.ipv4_mapped  # of a socket for both
    return f"{address}/32"
