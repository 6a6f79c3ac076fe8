"""A job as the agent asked for it, and what is the same for all jobs of a launcher.

What init makes of it is in ``init.py`` and ``command.py``.
"""

from __future__ import annotations

from node_agent.launcher.images import Images

TYPE_CHECKING = False  # typing is another import
if TYPE_CHECKING:
    from node_agent.launcher.zygote import Inits

RESULT_NAME = "result"


class Shared:
    """What is the same for all jobs of this launcher."""

    def __init__(self) -> None:
        self.seccomp = b""
        self.last_cap = 40
        self.userns = True  # the job's own user namespace, entered last
        self.net_fd = -1  # an empty network namespace shared by all jobs; -1: one for each
        self.landlock_fd = -1
        self.masked_files: list[str] = []
        self.masked_dirs: list[str] = []
        self.has_devices = False
        self.holds: frozenset[str] = frozenset()  # cgroup controllers (``cgroups.Tree.holds``)
        self.images = Images()
        self.proc_beneath = True  # the root holds a /proc that a job's own must replace
        self.inits: Inits | None = None  # of the native launcher

    def close(self) -> None:
        """Nothing is started any more."""
        if self.inits is not None:
            self.inits.close()


class Shape:
    """What a sandbox is made from before its job is known. Equal ``facts``: interchangeable."""

    def __init__(self, message: dict[str, object]) -> None:
        self.hostname, self.network = str(message["hostname"]), str(message["network"])
        self.devices = _strings(message["devices"])
        number = {name: value for name, value in message.items() if isinstance(value, int)}
        self.tmp_bytes, self.shm_bytes = number["tmp_bytes"], number["shm_bytes"]
        self.work_bytes, self.tmp_inodes = number["work_bytes"], number["tmp_inodes"]
        self.work_inodes = number["work_inodes"]
        self.io = (number["io_read_bytes_per_s"], number["io_write_bytes_per_s"])
        self.cpus, self.mems = _numbers(message["cpus"]), _numbers(message["mems"])
        self.probe = bool(message.get("probe"))
        self.image = str(message.get("image", ""))
        self.facts = tuple(map(str, vars(self).values()))


class Input:
    """A file to be in /work before the job starts; ``path`` is relative and was checked."""

    def __init__(self, path: str, size_bytes: int, writable: bool) -> None:
        self.path, self.size_bytes, self.writable = path, size_bytes, writable

    @classmethod
    def told(cls, item: dict[str, object]) -> Input:
        """From the agent's message."""
        return cls(str(item["path"]), int(str(item["size_bytes"])), bool(item["writable"]))


class JobSpec:
    """One job as the agent asked for it."""

    def __init__(self, message: dict[str, object]) -> None:
        self.shape = Shape(message)
        self.key, self.cwd = str(message["key"]), str(message["cwd"])
        self.argv = _strings(message["argv"])
        self.env = {name: str(value) for name, value in _dict(message["env"]).items()}
        number = {name: value for name, value in message.items() if isinstance(value, int)}
        self.memory_bytes, self.cpu_millis = number["memory_bytes"], number["cpu_millis"]
        self.pids_max, self.open_files_max = number["pids_max"], number["open_files_max"]
        self.wall_ms, self.grace_ms = number["wall_ms"], number["grace_ms"]
        self.cpu_ms, self.idle_ms = number["cpu_ms"], number["idle_ms"]
        self.swap_bytes = number["swap_bytes"]
        self.result_bytes_max = number["result_bytes_max"]
        self.collects = bool(message["outputs"])
        self.inputs = [Input.told(_dict(item)) for item in _list(message["inputs"])]
        self.lease_until_ms = number.get("lease_until_ms", 0)


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("expected a list")
    return value


def _strings(value: object) -> list[str]:
    return [str(item) for item in _list(value)]


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(int(text) for text in _strings(value))


def _dict(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("expected a mapping")
    return {str(name): item for name, item in value.items()}
