"""`schema` and `completion`."""

import click

from outrider.cli.common import Session, common


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
