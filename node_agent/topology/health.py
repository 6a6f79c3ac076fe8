"""How the GPUs do: cheap questions asked again and again, and events of the driver.

Unhealthy is a GPU that the driver lost, with uncorrectable memory errors, with a failed or pending
repair of its memory, or that had a critical Xid that no job causes by itself. Such a GPU is taken
out of what the node offers, with the reason; what runs there runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from node_agent.topology.gpu import answer
from node_agent.topology.nvml import Nvml, NvmlUnavailable

XIDS_OF_JOBS: Final = frozenset({13, 31, 43, 45, 68, 109})
"""Errors of the application, not of the GPU (NVIDIA's Xid catalogue; the same that its Kubernetes
device plugin passes over): illegal address, page fault, killed, preempted, video, timeout."""
XIDS_PER_LOOK_MAX: Final = 256
"""Events taken at once; a GPU that fails for good makes thousands."""


class Reading(NamedTuple):
    """What changes by the second; None where the driver does not say."""

    temperature_c: int | None
    power_mw: int | None
    memory_used_bytes: int | None
    processes: int | None
    uncorrected_errors: int | None


class HealthWatch:
    """Watches GPUs by UUID: their indices may shift when one is lost. Blocking: not for a loop."""

    def __init__(self, connect: Callable[[], Nvml], uuids: tuple[str, ...]) -> None:
        self._connect = connect
        self._uuids = uuids
        self._nvml: Nvml | None = None
        self._xids: dict[str, int] = {}
        """First critical Xid by GPU; kept until the agent starts anew, after the repair."""
        self.readings: dict[str, Reading] = {}

    def look(self) -> dict[str, str]:
        """UUID → why it is unhealthy; healthy ones are left out."""
        try:
            nvml = self._nvml or self._open()
            self._take_xids(nvml)
        except NvmlUnavailable as error:
            self.close()
            return dict.fromkeys(self._uuids, f"the driver does not answer: {error}")
        reasons = {uuid: self._reason(nvml, uuid) for uuid in self._uuids}
        return {uuid: reason for uuid, reason in reasons.items() if reason}

    def close(self) -> None:
        """Lets go of the driver."""
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            answer(nvml.close, None)

    def _open(self) -> Nvml:
        nvml = self._nvml = self._connect()
        handles = [answer(partial(nvml.handle_of, uuid), None) for uuid in self._uuids]
        # Without events (a container may lack them) the counters still tell.
        answer(partial(nvml.watch_xids, [one for one in handles if one is not None]), None)
        return nvml

    def _take_xids(self, nvml: Nvml) -> None:
        for _ in range(XIDS_PER_LOOK_MAX):
            event = answer(nvml.next_xid, None)
            if event is None:
                return
            uuid, xid = event
            if xid not in XIDS_OF_JOBS:
                self._xids.setdefault(uuid, xid)

    def _reason(self, nvml: Nvml, uuid: str) -> str:
        try:
            handle = nvml.handle_of(uuid)
            nvml.uuid(handle)
        except NvmlUnavailable as error:
            self.readings.pop(uuid, None)
            return f"lost: {error}"
        errors = _maybe(nvml.uncorrected_errors, handle)
        used = _maybe(nvml.memory_used_bytes, handle)
        processes = _maybe(nvml.processes, handle)
        self.readings[uuid] = Reading(
            temperature_c=_maybe(nvml.temperature_c, handle),
            power_mw=_maybe(nvml.power_mw, handle),
            memory_used_bytes=used,
            processes=None if processes is None else len(processes),
            uncorrected_errors=errors,
        )
        if uuid in self._xids:
            return f"critical error: Xid {self._xids[uuid]}; restart the agent once it is repaired"
        if errors:
            return f"{errors} uncorrectable memory errors since the driver was loaded"
        rows = _maybe(nvml.remapped_rows, handle)
        if rows is not None and rows[3]:
            return "row remapping failed: its memory is worn out"
        if rows is not None and rows[2]:
            return "row remapping is pending: reset the GPU"
        if _maybe(nvml.retired_pages_pending, handle):
            return "retired pages are pending: reset the GPU"
        return ""


def _maybe(query: Callable[[Any], Any], handle: Any) -> Any:
    """The answer, None where the driver has none."""
    return answer(partial(query, handle), None)
