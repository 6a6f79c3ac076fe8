"""Two processes under one coordinator's name: the second refuses to start, in one line."""

import socket

import pytest

from controlplane.hints import require_alone
from idl.errors import ConfigError
from idl.ids import CoordinatorId
from idl.members import CoordinatorPeer


def _peer(port: int, address: str = "127.0.0.1") -> CoordinatorPeer:
    return CoordinatorPeer(name=CoordinatorId("c1"), address=address, dds_port=port)


def test_a_taken_port_is_a_running_twin() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as twin:
        twin.bind(("", 0))
        port = twin.getsockname()[1]
        with pytest.raises(ConfigError, match="c1 runs already") as refused:
            require_alone(_peer(port))
        assert len(str(refused.value).splitlines()) == 1
    require_alone(_peer(port))


def test_an_address_of_another_machine_is_not_for_us_to_judge() -> None:
    require_alone(_peer(7_400, "203.0.113.1"))
