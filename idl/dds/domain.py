"""Cyclone DDS configuration as XML, from our settings. Every element answers a measured trap
(facts: pruning, ports, multicast, name resolution)."""

import socket
from collections.abc import Iterable
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from idl.errors import ConfigError
from idl.settings import DdsSettings

PORT_BASE: Final = 7400
DOMAIN_GAIN: Final = 250
PARTICIPANT_GAIN: Final = 2
UNICAST_META_OFFSET: Final = 10
"""RTPS well-known ports (DDSI-RTPS 9.6.2.4): 7400 + 250·domain + 10 + 2·participant."""
PARTICIPANTS_MAX: Final = 119
"""What fits between two domains' ports."""
DOMAIN_MAX: Final = 230
HEARTBEATS_COORDINATOR: Final = (
    '<HeartbeatInterval min="2 ms" minsched="5 ms" max="1 s">10 ms</HeartbeatInterval>'
)
"""An election waits for what got lost, so a coordinator's writers ask soon whether all arrived."""
HEARTBEATS_AGENT: Final = (
    '<HeartbeatInterval min="5 ms" minsched="20 ms" max="1 s">100 ms</HeartbeatInterval>'
)
"""Cyclone's defaults, but for the maximum. One thread sends heartbeats first and waiting samples
after them: where a thousand agents start at once, answering coordinators' pace it sends nothing
else, and what they ask for again is never sent (docs/benchmarks.md, a thousand agents)."""


def discovery_port(domain: int, index: int) -> int:
    """UDP port on which participant `index` of `domain` is discovered."""
    return PORT_BASE + DOMAIN_GAIN * domain + UNICAST_META_OFFSET + PARTICIPANT_GAIN * index


def participant_index(domain: int, port: int) -> int:
    """Inverse of `discovery_port`. Raises ConfigError."""
    index, odd = divmod(port - discovery_port(domain, 0), PARTICIPANT_GAIN)
    if odd or not 0 <= index <= PARTICIPANTS_MAX:
        raise ConfigError(
            f"dds_port {port} does not belong to DDS domain {domain}; "
            f"use {discovery_port(domain, 0)} + 2·n, n at most {PARTICIPANTS_MAX}"
        )
    return index


def resolve(address: str) -> str:
    """Name → IPv4 address. An unresolvable name in Cyclone's own configuration calls abort()."""
    try:
        return str(socket.getaddrinfo(address, None, socket.AF_INET, socket.SOCK_DGRAM)[0][4][0])
    except (OSError, UnicodeError) as error:  # the latter of what the idna codec does not like
        raise ConfigError(f"coordinator address {address!r} does not resolve: {error}") from error


def _interface(name: str) -> str:
    attribute = "address" if name[:1].isdigit() else "name"
    return f'<NetworkInterface {attribute}={quoteattr(name)} multicast="false"/>'


def domain_xml(settings: DdsSettings, targets: Iterable[str], own_port: int) -> str:
    """Configuration of one process. `targets`: `address:port` of those it calls (`idl.dds.peers`).

    `own_port` 0: an agent, whose ports the kernel chooses (it calls the coordinators, nobody calls
    it). With `auto` an agent that starts first would take a coordinator's port on the same host.
    """
    index = "none" if own_port == 0 else str(participant_index(settings.domain, own_port))
    heartbeats = HEARTBEATS_AGENT if own_port == 0 else HEARTBEATS_COORDINATOR
    peers = "".join(f'<Peer Address="{where}" PruneDelay="inf"/>' for where in sorted(targets))
    return f"""<CycloneDDS xmlns="https://cdds.io/config"><Domain Id="any">
<General><Interfaces>{_interface(settings.interface)}</Interfaces>
<AllowMulticast>false</AllowMulticast><MaxMessageSize>1400B</MaxMessageSize></General>
<Discovery><ExternalDomainId>{settings.domain}</ExternalDomainId>
<Tag>{escape(settings.tag)}</Tag><ParticipantIndex>{index}</ParticipantIndex>
<Peers AddLocalhost="false">{peers}</Peers>
<LeaseDuration>{settings.lease_ms} ms</LeaseDuration><SPDPInterval>1s</SPDPInterval></Discovery>
<Internal><SocketReceiveBufferSize min="default" max="4MB"/><NackDelay>5 ms</NackDelay>
{heartbeats}
<Watermarks><WhcHigh>8MB</WhcHigh><WhcHighInit>8MB</WhcHighInit><WhcAdaptive>false</WhcAdaptive>
</Watermarks></Internal></Domain></CycloneDDS>"""
