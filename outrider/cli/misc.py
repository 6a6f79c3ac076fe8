"""`topics`, `schema` and `completion`."""

import click

from outrider.cli.common import Session, common


@click.command()
@common
def topics(session: Session) -> None:
    """Create the cluster's topics in Kafka; those that are there are left alone.

    `outrider up` does it by itself: this is for clusters made in another way.

    \b
    Examples:
      outrider topics --config cluster.yaml
    """
    from dataplane.topics import ensure_topics
    from idl.topics import TopicNames

    settings = session.settings
    names = TopicNames(settings.kafka.prefix)
    table = names.table(settings.pool, tuple(settings.queues), settings.kafka.queue_partitions)
    report = ensure_topics(settings.kafka, table, progress=session.progress)
    for note in report.notes:
        session.progress(note)
    session.answer(
        report,
        lambda: click.echo(
            f"created {', '.join(report.created) or 'nothing'}; {len(report.existing)} were there"
        ),
    )


@click.command()
@common
def schema(session: Session) -> None:
    """The JSON Schema of a job in its wire form, for submitters in any language.

    \b
    Examples:
      outrider schema > job.v1.json
    """
    from idl.schema import job_schema_text

    click.echo(job_schema_text(), nl=False)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      outrider completion bash > ~/.local/share/bash-completion/completions/outrider
      outrider completion zsh > ~/.zfunc/_outrider
      outrider completion fish > ~/.config/fish/completions/outrider.fish
    """
    from click.shell_completion import get_completion_class

    from outrider.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(cli, {}, "outrider", "_OUTRIDER_COMPLETE").source())
