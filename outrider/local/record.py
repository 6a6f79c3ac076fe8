"""Where a local cluster keeps its things, and `run.json`: what was started, readable after a crash.

`run.json` is written before a process is started (its plan) and after (its identity), each time
as a whole by rename(2), so that `outrider down` can clean up whatever a crashed `up` left.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from idl.errors import ConfigError
from idl.ids import is_valid_name
from outrider.local.process import Identity, is_alive

DEFAULT_NAME: Final = "local"
RUN_VERSION: Final = 1
LOCK_MARK: Final = b"the lock of an Outrider local cluster\n"
"""What the lock file holds: it tells a cluster's folder, even where `up` failed, from others."""

Role = Literal["broker", "coordinator", "agent"]


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the cluster. `identity` is None between the plan and the start."""

    name: str
    role: Role
    arguments: tuple[str, ...]
    log: str
    metrics_address: str = "127.0.0.1"
    metrics_port: int = 0
    note: str = ""
    env: dict[str, str] = {}
    identity: Identity | None = None

    @property
    def alive(self) -> bool:
        """True while the recorded process runs."""
        return self.identity is not None and is_alive(self.identity)


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `up` started. `phase` is `up` once everything answered."""

    v: int = RUN_VERSION
    name: str
    phase: Literal["starting", "up"]
    started_ms: int
    kafka: str
    durable: bool = False
    processes: tuple[ProcessRecord, ...] = ()

    def process(self, name: str) -> ProcessRecord:
        """The process `name`. Raises ConfigError."""
        for record in self.processes:
            if record.name == name:
                return record
        known = ", ".join(record.name for record in self.processes)
        raise ConfigError(f"no process {name!r} in local cluster {self.name!r} (there: {known})")

    def having(self, changed: ProcessRecord) -> "RunRecord":
        """The same run with one process added or replaced by name."""
        others = [record for record in self.processes if record.name != changed.name]
        at = next((i for i, r in enumerate(self.processes) if r.name == changed.name), len(others))
        others.insert(at, changed)
        return msgspec.structs.replace(self, processes=tuple(others))


class Layout(NamedTuple):
    """The files of one local cluster below `folder`."""

    name: str
    folder: Path

    @property
    def cluster_file(self) -> Path:
        """The cluster file (`idl.settings.ClusterSettings`) that every process reads."""
        return self.folder / "cluster.json"

    @property
    def secret_file(self) -> Path:
        """32 random bytes in hex, mode 0600: the root of every control message's key."""
        return self.folder / "secret"

    @property
    def run_file(self) -> Path:
        """`RunRecord`; there while something may run."""
        return self.folder / "run.json"

    @property
    def lock_file(self) -> Path:
        """Held (flock) while `up` or `down` works."""
        return self.folder / "lock"

    @property
    def logs(self) -> Path:
        """One file per process."""
        return self.folder / "logs"

    @property
    def state(self) -> Path:
        """Journals of the agents and whatever else a process keeps."""
        return self.folder / "state"

    @property
    def broker(self) -> Path:
        """Data of a broker that we start."""
        return self.folder / "broker"

    @property
    def mark(self) -> str:
        """What the marks of this cluster's processes start with (`process.MARK_VARIABLE`)."""
        return f"{self.folder}:"

    @property
    def is_ours(self) -> bool:
        """A local cluster was started here: what is in the folder may be replaced or removed.

        A `cluster.json` alone does not tell: people keep cluster files of their own.
        """
        try:
            lock = self.lock_file.read_bytes()
        except OSError:
            return self.run_file.exists()
        return lock == LOCK_MARK or self.run_file.exists() or self.cluster_file.exists()

    def claim(self) -> None:
        """Marks a folder as a cluster's, so that things may be put there before it is started."""
        self.lock_file.write_bytes(LOCK_MARK)

    def check_free(self) -> None:
        """Raises ConfigError where the folder holds what no local cluster put there."""
        try:
            things = {entry.name: entry.lstat().st_size for entry in self.folder.iterdir()}
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"cannot use {self.folder}: {error.strerror}") from error
        if things and things != {self.lock_file.name: 0} and not self.is_ours:
            raise ConfigError(
                f"{self.folder} holds files that are not a local cluster's, and `up` would replace "
                "some; give a new or an empty folder"
            )

    def check_ours(self) -> None:
        """Raises ConfigError where no local cluster was started in the folder."""
        if not self.is_ours:
            raise ConfigError(
                f"{self.folder} is not the folder of a local cluster: nothing was removed"
            )

    def remove(self) -> None:
        """Removes the folder with everything in it. Raises ConfigError: not ours, or it stays."""
        self.check_ours()
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            where, why = error.filename or self.folder, error.strerror or error
            raise ConfigError(f"cannot remove {where}: {why}; remove it by hand") from error

    def read_run(self) -> RunRecord | None:
        """The run record, or None where nothing was started. Raises ConfigError."""
        try:
            return msgspec.json.decode(self.run_file.read_bytes(), type=RunRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(
                f"cannot read {self.run_file}: {error}; stop its processes by hand and remove it"
            ) from error

    def write_run(self, run: RunRecord) -> None:
        """Replaces the run record as a whole."""
        write_atomically(self.run_file, msgspec.json.format(msgspec.json.encode(run)))


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """The file has the old or the new content, never half of it. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def write_chosen(path: Path, content: bytes) -> None:
    """Writes where a person said: a device or a pipe is written to and never replaced, a link is
    followed, and a file has the old or the new content. Raises ConfigError."""
    if not path.exists() or path.is_file():
        write_atomically(Path(os.path.realpath(path)), content)
        return
    try:
        with path.open("wb") as sink:
            sink.write(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def layout(
    name: str = DEFAULT_NAME,
    folder: str | Path | None = None,
    env: Mapping[str, str] = os.environ,
) -> Layout:
    """`folder`, or `$XDG_STATE_HOME/outrider/<name>`, or `~/.local/state/outrider/<name>`."""
    if not is_valid_name(name):
        raise ConfigError(f"cluster name {name!r} is not a name; use letters, digits, . _ -")
    if folder is not None:
        return Layout(name, Path(folder).expanduser().absolute())
    home = env.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return Layout(name, Path(home).absolute() / "outrider" / name)
