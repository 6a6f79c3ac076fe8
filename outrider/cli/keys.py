"""`keys`: secrets and key pairs of the control plane (ADR 0003)."""

import secrets
from pathlib import Path
from typing import Final

import click

from outrider.cli.common import Session, common

SECRET_BYTES: Final = 32


@click.group()
def keys() -> None:
    """Make and divide the keys that control messages are signed with.

    Rotation needs no downtime: put the new secret on a second line everywhere, then make it the
    first line everywhere, then remove the old one. Processes notice within seconds.

    \b
    Examples:
      outrider keys secret /etc/outrider/secret
      outrider keys coordinator /etc/outrider/c1.key
      outrider keys node gpu-17 gpu-17.secret
    """


def _write_private(path: Path, text: str) -> None:
    from idl.errors import ConfigError

    try:
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
@common
def secret(session: Session, file: Path) -> None:
    """Write a fresh cluster secret to FILE (mode 600; it must not exist).

    \b
    Examples:
      outrider keys secret /etc/outrider/secret
    """
    _write_private(file, secrets.token_hex(SECRET_BYTES) + "\n")
    session.answer({"file": str(file)}, lambda: click.echo(f"wrote {file}"))


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
@common
def coordinator(session: Session, file: Path) -> None:
    """Write a coordinator's Ed25519 key to FILE; print its public half for the cluster file.

    \b
    Examples:
      outrider keys coordinator /etc/outrider/c1.key
    """
    from idl.keys import new_private_key

    private, public = new_private_key()
    _write_private(file, private + "\n")
    session.answer({"file": str(file), "public_key": public}, lambda: click.echo(public))


@keys.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@common
def node(session: Session, name: str, file: Path) -> None:
    """Write to FILE the keys of node NAME alone, derived from the cluster's secret_file.

    A node that has this file instead of the cluster secret can speak for nobody else.

    \b
    Examples:
      outrider keys node gpu-17 gpu-17.secret
    """
    from idl.errors import ConfigError
    from idl.ids import NodeId
    from idl.keys import node_key_lines

    where = session.settings.secret_file
    try:
        text = Path(where).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read secret file {where!r}: {error.strerror}") from error
    _write_private(file, node_key_lines(text, where, NodeId(name)))
    session.answer({"file": str(file), "node": name}, lambda: click.echo(f"wrote {file}"))
