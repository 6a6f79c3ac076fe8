"""`up` and `down`: the cluster on this machine."""

from pathlib import Path
from typing import Any

import click

from outrider.cli.common import Session, common, print_table
from outrider.local.record import DEFAULT_NAME

_NAME = click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which local cluster.")
_DIR = click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False),
    help="Its folder; default $XDG_STATE_HOME/outrider/NAME.",
)  # fmt: skip


@click.command()
@_NAME
@_DIR
@click.option(
    "--kafka", default="embedded", show_default=True, metavar="embedded|apache|HOST:PORT,…",
    help="Which broker: in memory, a local Apache Kafka (durable), or one that runs.",
)  # fmt: skip
@click.option("--kafka-nodes", type=int, default=1, show_default=True, help="Of apache: 1 or 3.")
@click.option("--prefix", default="", help="Of all topic names.")
@click.option("--coordinators", type=int, default=3, show_default=True)
@click.option("--agents", type=int, help="Default: 2, or as many as node profiles.")
@click.option(
    "--node-profile", metavar="NAME[,NAME...]",
    help="Machines that the agents play in turn, simulated: jobs there get no GPU. `real`: this.",
)  # fmt: skip
@click.option("--queue", "queues", multiple=True, default=("default",), show_default=True,
              help="A queue to create; repeatable.")  # fmt: skip
@click.option("--node-cpu", metavar="CPU", help="What each agent offers; default: an even share.")
@click.option("--node-memory", metavar="SIZE", help="What each agent offers, e.g. 4Gi.")
@click.option("--overcommit", is_flag=True, help="Let the agents offer more than there is.")
@click.option("--allow-host-network", is_flag=True,
              help="Let jobs of the profile `network` use this machine's network.")  # fmt: skip
@click.option(
    "--sandbox", type=click.Choice(("native", "crun", "runc", "runsc")), default="native",
    show_default=True, help="What the agents run jobs in; the runtimes need root.",
)  # fmt: skip
@click.option(
    "--image", "images", multiple=True, metavar="NAME=dir:/PATH|NAME=oci:/PATH[:REF]",
    help="A root that jobs may ask for (submit --image NAME): a directory or an OCI layout.",
)  # fmt: skip
@click.option("--timeout", default="60s", show_default=True, help="For everything to be ready.")
@common
def up(session: Session, **options: Any) -> None:
    """Start a cluster on this machine.

    Broker, coordinators and agents run detached; their logs are in the cluster's folder.

    \b
    Examples:
      outrider up
      outrider up --kafka apache --agents 1
      outrider up --node-profile dgx-a100,v100-cube-mesh
      outrider up --image alpine=oci:/srv/images/alpine
      outrider up --queue fast --queue slow --node-cpu 2 --overcommit
      outrider up --name second --kafka 127.0.0.1:9092 --prefix second.
    """
    from idl.units import parse_bytes, parse_cpu_millis, parse_ms
    from outrider.local.cluster import LocalCluster, LocalOptions

    cpu, memory = options.pop("node_cpu"), options.pop("node_memory")
    profiles = tuple(filter(None, (options.pop("node_profile") or "").split(",")))
    agents = options.pop("agents")
    if agents is None:
        agents = len(profiles) or 2
    cluster = LocalCluster.start(
        LocalOptions(
            node_cpu_millis=parse_cpu_millis(cpu) if cpu else None,
            node_memory_bytes=parse_bytes(memory) if memory else None,
            node_profiles=profiles,
            agents=agents,
            ready_timeout_s=parse_ms(options.pop("timeout")) / 1000,
            **options,
        ),
        session.progress,
    )
    session.answer(
        {
            "name": cluster.run.name,
            "config": str(cluster.config_path),
            "kafka": cluster.run.kafka,
            "durable": cluster.run.durable,
            "processes": cluster.processes,
        },
        lambda: _show(cluster),
    )


def _show(cluster: Any) -> None:
    print_table(
        ("PROCESS", "ROLE", ">PID", ">METRICS", "NOTE"),
        [
            (
                record.name,
                record.role,
                record.identity.pid if record.identity else "-",
                record.metrics_port or "-",
                record.note,
            )
            for record in cluster.processes
        ],
    )
    click.echo(f"cluster file: {cluster.config_path}")
    unenforced = _unenforced(cluster)
    if unenforced:
        names = ",".join(unenforced)
        click.echo(f"nodes here cannot enforce {', '.join(unenforced)}: jobs that require it wait.")
        click.echo(f"to do without on this machine: export OUTRIDER_ALLOW_UNENFORCED={names}")
    click.echo("try: outrider submit --wait -- echo hello")


def _unenforced(cluster: Any) -> list[str]:
    """Limits that some node cannot hold (without root, or without a delegated cgroup)."""
    from outrider.client.job import ALL_LIMITS
    from outrider.client.view import LedgerView

    view = LedgerView(cluster.settings)
    view.advance()
    nodes = [node for node in view.state.nodes.values() if not node.lost]
    return [name for name in ALL_LIMITS if any(name not in node.enforces for node in nodes)]


@click.command()
@_NAME
@_DIR
@click.option("--purge", is_flag=True, help="Remove its folder with all data.")
@common
def down(session: Session, name: str, folder: Path | None, purge: bool) -> None:
    """Stop the cluster on this machine: agents, then coordinators, then the broker.

    Only processes that `up` started are touched. Running jobs end with their agent.

    \b
    Examples:
      outrider down
      outrider down --name second --purge
    """
    from outrider.cli.exits import NotFoundError
    from outrider.local.cluster import LocalCluster
    from outrider.local.record import layout

    cluster = LocalCluster.attach(name, folder)
    if cluster is None:
        place = layout(name, folder)
        if purge and place.folder.exists():
            LocalCluster.purge(place)
            session.answer({"name": name, "stopped": [], "notes": []}, lambda: None)
            return
        raise NotFoundError(f"no local cluster {name!r} runs (no {place.run_file})")
    stopped = [record.name for record in cluster.processes]
    notes = cluster.stop(session.progress, purge=purge)
    for note in notes:
        session.progress(note)
    session.answer(
        {"name": name, "stopped": stopped, "notes": notes},
        lambda: click.echo(f"stopped {', '.join(stopped) or 'nothing'}"),
    )
