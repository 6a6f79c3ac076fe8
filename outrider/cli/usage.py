"""What an attempt used, and the files it left, for people."""

from typing import TYPE_CHECKING

import click

from idl.units import format_bytes, format_ms
from outrider.cli.common import print_table

if TYPE_CHECKING:
    from idl.records import AttemptResult, Usage


def usage_rows(usage: "Usage") -> list[tuple[str, str]]:
    """(what, how much); what the node could not measure is left out."""
    rows = [
        ("wall time", format_ms(usage.wall_ms)),
        ("CPU time", format_ms(usage.cpu_ms)),
        ("memory, peak", format_bytes(usage.memory_peak_bytes)),
    ]
    times = (
        ("CPU time, user", usage.cpu_user_ms),
        ("CPU time, system", usage.cpu_system_ms),
        ("held back by its CPU share", usage.throttled_ms),
    )
    rows += [(what, format_ms(ms)) for what, ms in times if ms is not None]
    sizes = (("disk, read", usage.io_read_bytes), ("disk, written", usage.io_write_bytes))
    rows += [(what, format_bytes(size)) for what, size in sizes if size is not None]
    if usage.pids_peak is not None:
        rows.append(("tasks, peak", str(usage.pids_peak)))
    if usage.pressure is not None:
        waits = (usage.pressure.cpu_us, usage.pressure.memory_us, usage.pressure.io_us)
        for what, us in zip(("CPU", "memory", "disks"), waits, strict=True):
            rows.append((f"some task waited for {what}", format_ms(us / 1000)))
    if usage.memory_events is not None:
        events = usage.memory_events
        rows.append(("memory limit reached", f"{events.max} times"))
        rows.append(("tasks killed for want of memory", str(events.oom_kill)))
    return rows


def show_usage(record: "AttemptResult | None") -> None:
    """Prints it."""
    if record is None:
        click.echo("no attempt wrote a result")
        return
    how = record.outcome + (f": {record.detail}" if record.detail else "")
    head = [("outcome", how), ("node", record.node), ("attempt", str(record.attempt))]
    files = [(f"output {one.name}", format_bytes(one.size_bytes)) for one in record.outputs]
    files += [(f"no output {name}", why) for name, why in record.outputs_missing.items()]
    print_table(("WHAT", "HOW MUCH"), [*head, *usage_rows(record.usage), *files])
