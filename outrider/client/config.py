"""Which cluster is meant: a path, `$OUTRIDER_CONFIG`, or the local cluster that runs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from idl.errors import ConfigError
from idl.settings import ClusterSettings, load_cluster
from outrider.local.record import DEFAULT_NAME, layout

CONFIG_VARIABLE: Final = "OUTRIDER_CONFIG"


def _local_names(home: Path) -> list[str]:
    if not home.is_dir():
        return []
    return sorted(folder.name for folder in home.iterdir() if (folder / "run.json").exists())


def find_config(config: str | Path | None = None, env: Mapping[str, str] = os.environ) -> Path:
    """The cluster file. Raises ConfigError that says what to do where none is found.

    Precedence: `config`, `$OUTRIDER_CONFIG`, the local cluster named `local`, the only local one.
    """
    chosen = config or env.get(CONFIG_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    default = layout(DEFAULT_NAME, env=env)
    names = _local_names(default.folder.parent)
    if DEFAULT_NAME in names:
        return default.cluster_file
    if len(names) == 1:
        return layout(names[0], env=env).cluster_file
    if names:
        raise ConfigError(
            f"several local clusters run ({', '.join(names)}); choose one with --config "
            f"{default.folder.parent}/NAME/cluster.json or ${CONFIG_VARIABLE}"
        )
    raise ConfigError(
        f"no cluster is known: start one with `outrider up`, or name a cluster file with "
        f"--config or ${CONFIG_VARIABLE}"
    )


def find_cluster(
    config: str | Path | ClusterSettings | None = None, env: Mapping[str, str] = os.environ
) -> ClusterSettings:
    """The settings of that cluster, `OUTRIDER_KAFKA_*` over the file. Raises ConfigError."""
    if isinstance(config, ClusterSettings):
        return config
    return load_cluster(find_config(config, env), env)
