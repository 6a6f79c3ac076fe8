"""`status`, `nodes`, `drain`: the pool as the ledger and Kafka tell it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from outrider.cli.common import Session, age, common, now_ms, print_table, say_all
from outrider.cli.queues import queue_rows, show_queues

if TYPE_CHECKING:
    from dataplane.core.nodes import Node
    from dataplane.core.state import PoolState
    from outrider.client.view import LedgerView
    from outrider.local.record import ProcessRecord

STATUS_TIMEOUT_S: Final = 2.0
"""A broker that is well says in milliseconds how many there are."""
METRICS_TIMEOUT_S: Final = 0.5
"""A coordinator on this machine answers in a millisecond, or is paused."""
STALLED_METRIC: Final = "outrider_kafka_stalled_since_seconds"
PATIENCE_METRIC: Final = "outrider_election_timeout_seconds"
CONFIGURED_METRIC: Final = "outrider_election_timeout_configured_seconds"


def node_state(node: "Node") -> str:
    """`ready`, `draining` or `lost`."""
    if node.lost:
        return "lost"
    return "draining" if node.draining else "ready"


def node_document(node: "Node") -> dict[str, Any]:
    """A node as `--json` shows it."""
    from outrider.client.job import ALL_LIMITS

    capacity = node.capacity
    return {
        "node": node.name,
        "state": node_state(node),
        "reason": node.lost_reason or node.drain_reason,
        "simulated": node.simulated,
        "profile": node.topology.profile,
        "cpu_millis": capacity.cpu_millis,
        "cpu_millis_used": capacity.cpu_millis - node.free_cpu_millis,
        "memory_bytes": capacity.memory_bytes,
        "memory_bytes_used": capacity.memory_bytes - node.free_memory_bytes,
        "gpus": len(capacity.gpus),
        "gpus_used": len(capacity.gpus) - len(node.free_gpus),
        "attempts": len(node.attempts),
        "enforces": [name for name in ALL_LIMITS if name in node.enforces],
        "missing": [name for name in ALL_LIMITS if name not in node.enforces],
        "labels": node.labels,
        "images": node.images,
        "seen_ms": node.seen_ms,
    }


def _enforcement(document: dict[str, Any]) -> str:
    missing = document["missing"]
    return "everything" if not missing else f"all but {', '.join(missing)}"


def _show_nodes(documents: list[dict[str, Any]]) -> None:
    from idl.units import format_bytes

    print_table(
        (
            "NODE",
            "STATE",
            ">CPU",
            ">MEMORY",
            ">GPUS",
            ">JOBS",
            "ENFORCES",
            "LABELS",
            "IMAGES",
            "SINCE",
        ),
        [
            (
                doc["node"],
                f"{doc['state']}, simulated" if doc["simulated"] else doc["state"],
                f"{doc['cpu_millis_used'] / 1000:g}/{doc['cpu_millis'] / 1000:g}",
                f"{format_bytes(doc['memory_bytes_used'])}/{format_bytes(doc['memory_bytes'])}",
                f"{doc['gpus_used']}/{doc['gpus']}",
                doc["attempts"],
                _enforcement(doc),
                ",".join(f"{key}={value}" for key, value in sorted(doc["labels"].items())) or "-",
                ",".join(sorted(doc["images"])) or "-",
                age(now_ms(), doc["seen_ms"]),
            )
            for doc in documents
        ],
        empty="no node has joined the pool; start an agent",
    )


def node_documents(state: "PoolState") -> list[dict[str, Any]]:
    """All nodes, by name."""
    return [node_document(node) for _, node in sorted(state.nodes.items())]


@click.command()
@click.argument("node", required=False)
@click.option("--topology", is_flag=True, help="NUMA domains, cores, caches, GPUs, NICs, links.")
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="The topology of NODE as a picture.")  # fmt: skip
@common
def nodes(session: Session, node: str | None, topology: bool, svg: Path | None) -> None:
    """Nodes: capacity and what is reserved of it, what they enforce, labels, images; or only NODE.

    \b
    Examples:
      outrider nodes
      outrider nodes --json | jq '.[] | select(.state == "lost")'
      outrider nodes --topology n1
      outrider nodes n1 --svg n1.svg
    """
    state = session.view().state
    chosen = _chosen(state, node)
    if svg is not None:
        if node is None:
            raise click.UsageError("--svg draws one node; name it: outrider nodes n1 --svg n1.svg")
        _draw(session, chosen[0], svg)
    elif topology:
        from outrider.cli.topology import topology_document, topology_lines

        session.answer(
            [topology_document(one) for one in chosen],
            lambda: say_all(line for one in chosen for line in (*topology_lines(one), "")),
        )
    else:
        documents = [node_document(one) for one in chosen]
        session.answer(documents, lambda: _show_nodes(documents))


def _chosen(state: "PoolState", name: str | None) -> "list[Node]":
    """One node or all, by name. Raises NotFoundError."""
    from outrider.cli.exits import NotFoundError

    if name is None:
        return [node for _, node in sorted(state.nodes.items())]
    if name not in state.nodes:
        known = ", ".join(sorted(state.nodes)) or "none"
        raise NotFoundError(f"no node {name!r} in the ledger (there: {known})")
    return [state.nodes[name]]


def _draw(session: Session, node: "Node", file: Path) -> None:
    from outrider.cli.topology_svg import topology_svg
    from outrider.local.record import write_chosen

    write_chosen(file, topology_svg(node).encode())
    session.answer({"node": node.name, "svg": str(file)}, lambda: click.echo(f"drew {file}"))


def _local_records(session: Session) -> "tuple[ProcessRecord, ...]":
    """Processes of the local cluster that the cluster file belongs to, if it is one."""
    from outrider.client.config import find_config
    from outrider.local.record import Layout

    place = Layout("", find_config(session.config).parent)
    run = place.read_run()
    return () if run is None else tuple(run.processes)


def _local_processes(session: Session) -> list[dict[str, Any]]:
    return [
        {"process": record.name, "role": record.role, "alive": record.alive}
        for record in _local_records(session)
    ]


def coordinator_figures(session: Session) -> dict[str, int]:
    """Of the coordinators on this machine, each figure's highest, in ms; {} where none is here.

    A Kafka that stalls cannot be asked, and the CLI speaks no DDS: their /metrics can be asked.
    """
    import http.client

    found: dict[str, int] = {}
    for record in _local_records(session):
        if record.role != "coordinator" or not record.alive:
            continue
        asked = http.client.HTTPConnection(
            record.metrics_address, record.metrics_port, timeout=METRICS_TIMEOUT_S
        )
        try:
            asked.request("GET", "/metrics")
            page = asked.getresponse().read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            continue  # paused or just gone: another one may lead
        finally:
            asked.close()
        for line in page.splitlines():
            name = line.partition("{")[0]
            if name in (STALLED_METRIC, PATIENCE_METRIC, CONFIGURED_METRIC):
                value_ms = round(float(line.rsplit(" ", 1)[1]) * 1000)
                found[name] = max(found.get(name, 0), value_ms)
    return found


def _reachable(session: Session) -> int:
    """How many brokers there are. Raises BrokerUnavailableError, with what the leader says."""
    from dataplane.kafka import check_reachable
    from idl.errors import BrokerUnavailableError

    try:
        return check_reachable(session.settings.kafka, STATUS_TIMEOUT_S)
    except BrokerUnavailableError as error:
        since = coordinator_figures(session).get(STALLED_METRIC, 0)
        if not since:
            raise
        raise BrokerUnavailableError(
            f"Kafka stalled since {_clock(since)} ({age(now_ms(), since)}): nothing is decided, "
            f"what runs goes on, and the leader waits for the broker at "
            f"{session.settings.kafka.bootstrap}"
        ) from error


def _clock(at_ms: int) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(at_ms / 1000, UTC).astimezone():%H:%M:%S}"


def status_document(session: Session) -> dict[str, Any]:
    """Everything `status` shows. Raises BrokerUnavailableError."""
    settings = session.settings
    brokers = _reachable(session)
    figures = coordinator_figures(session)
    stalled = figures.get(STALLED_METRIC, 0)
    view: LedgerView = session.view()
    state = view.state
    last = state.terms[-1] if state.terms else None
    return {
        "cluster": settings.cluster,
        "pool": settings.pool,
        "kafka": {
            "state": "stalled" if stalled else "ok",
            "stalled_since_ms": stalled,
            "brokers": brokers,
            "bootstrap": settings.kafka.bootstrap,
            "kind": settings.kafka.kind,
            "durable": settings.kafka.kind != "embedded",
        },
        "leader": view.leader,
        "term": state.term,
        "term_started_ms": last.at_ms if last else 0,
        "election": {
            "timeout_ms": figures.get(PATIENCE_METRIC, 0),
            "configured_ms": figures.get(CONFIGURED_METRIC, 0),
        },
        "ledger_offset": state.next_offset,
        "last_decision_ms": state.at_ms,
        "void_entries": sum(state.void_counts.values()),
        "dead_letters_due": len(state.dead_letters_due),
        "queues": queue_rows(settings, state),
        "nodes": node_documents(state),
        "processes": _local_processes(session),
    }


def _show_status(document: dict[str, Any]) -> None:
    now = now_ms()
    kafka = document["kafka"]
    brokers = f"{kafka['brokers']} broker{'s' if kafka['brokers'] != 1 else ''}"
    durable = "" if kafka["durable"] else ", in memory: a restart loses everything"
    led = (
        f"{document['leader']}, term {document['term']}, "
        f"since {age(now, document['term_started_ms'])}"
        if document["leader"]
        else "none: nobody has led yet"
    )
    click.echo(f"cluster  {document['cluster']}, pool {document['pool']}")
    if kafka["stalled_since_ms"]:
        kafka["state"] = f"stalled since {_clock(kafka['stalled_since_ms'])}"
    click.echo(f"kafka    {kafka['state']}, {brokers} at {kafka['bootstrap']}{durable}")
    click.echo(f"leader   {led}")
    election = document["election"]
    if election["timeout_ms"] > election["configured_ms"]:
        click.echo(
            f"election a silent leader is replaced after {election['timeout_ms']} ms instead of "
            f"{election['configured_ms']}: processes here run late (is the machine overloaded?)"
        )
    click.echo(
        f"ledger   {document['ledger_offset']} entries, "
        f"{document['void_entries']} void, last {age(now, document['last_decision_ms'])} ago"
        if document["ledger_offset"]
        else "ledger   empty"
    )
    ended = [row["process"] for row in document["processes"] if not row["alive"]]
    if ended:
        click.echo(f"ended    {', '.join(ended)}: see the logs in the cluster's folder")
    click.echo()
    show_queues(document["queues"])
    click.echo()
    _show_nodes(document["nodes"])


@click.command()
@common
def status(session: Session) -> None:
    """Leader, queues, nodes and Kafka at a glance.

    Unread: submissions in Kafka that no leader has taken in yet (queue depth beyond the window).

    \b
    Examples:
      outrider status
      watch -n1 outrider status
      outrider status --json | jq .queues
    """
    document = status_document(session)
    session.answer(document, lambda: _show_status(document))


@click.command()
@click.argument("node")
@click.option("--undo", is_flag=True, help="Place jobs there again.")
@common
def drain(session: Session, node: str, undo: bool) -> None:
    """Place nothing more on NODE; what runs there goes on.

    \b
    Examples:
      outrider drain n2
      outrider drain n2 --undo
    """
    from idl.records import DrainNode
    from outrider.cli.orders import give_orders

    view = session.view()
    _chosen(view.state, node)
    give_orders(session, view, {node: DrainNode(node=node, drain=not undo)})
    done = "takes jobs again" if undo else "gets no more jobs"
    session.answer({"node": node, "draining": not undo}, lambda: click.echo(f"{node} {done}"))
