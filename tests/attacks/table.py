# ruff: noqa: E501 - the programs are one-liners on purpose, as an attacker would type them
"""The attacks: a number, a program that runs inside a job, and what must come of it.

Programs print one word per try: ``ok`` or the errno's name. They run in the sandbox through the
public API, with the interpreter that is visible inside, after PRELUDE.
"""

from __future__ import annotations

import platform
import signal
from dataclasses import dataclass, field
from typing import Any

from node_agent.sandbox.plan import MIB, Limit
from node_agent.sandbox.seccomp import known_syscalls
from tests.attacks.checks import (
    NO_RESULT,
    OCI_NOSUID,
    OCI_PIDS,
    OWN_PID_1,
    RUNSC_NOSUID,
    Check,
    Difference,
    Seen,
    all_words,
    ended,
    exactly,
    runsc,
)

SIGSYS = 31
NUMBERS = known_syscalls(platform.machine())

PRELUDE = f"""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
NR = {NUMBERS!r}
def name(number): return errno.errorcode.get(number, str(number))
def sc(call, *args):
    number = NR[call] if isinstance(call, str) else call
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    print("ok" if result >= 0 else name(ctypes.get_errno()), end=" ")
    sys.stdout.flush()
def tried(function, *args):
    try: function(*args)
    except OSError as error: print(name(error.errno), end=" ")
    else: print("ok", end=" ")
    sys.stdout.flush()
def write(path, data=b"x"):
    with open(path, "wb") as file: file.write(data)
"""


@dataclass(frozen=True)
class Attack:
    """One attack; ``needs`` names limits without which there is nothing to attack."""

    number: int
    title: str
    program: str
    check: Check
    plan: dict[str, Any] = field(default_factory=dict)
    stdin: bytes = b""
    needs: frozenset[Limit] = frozenset()
    shell: bool = False
    differs: tuple[Difference, ...] = ()

    def held(self, backend: str, seen: Seen) -> bool:
        """Whether what came of it is what must, on this backend."""
        others = (other.check for other in self.differs if backend in other.backends)
        check = next(others, self.check)
        try:
            return check(seen)
        except (IndexError, ValueError):
            return False  # it said less than it would have to

    @property
    def id(self) -> str:
        return f"{self.number:02d}-{self.title.replace(' ', '-')}"


_EPERM = all_words("EPERM")
_DENIED = all_words("EROFS", "EACCES", "EPERM", "ENOENT")
_INT80 = r"""
import mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (i386 getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
"""
_MASKED = """
for path in ("keys", "kallsyms", "interrupts", "config.gz", "kcore", "timer_list"):
    try: print(len(open("/proc/" + path, "rb").read(64)), end=" ")
    except OSError as error: print(name(error.errno), end=" ")
"""
_FILES_DENIED = """
for path in ("/usr/x", "/x", "/dev/x", "/etc/passwd", "/etc/x", "/opt/x", "/proc/x"):
    tried(write, path)
tried(os.mkdir, "/y"); tried(os.unlink, "/etc/passwd"); tried(os.chmod, "/etc/passwd", 0o666)
tried(os.rename, "/etc/passwd", "/etc/p2")
"""
_KERNEL = [
    Attack(
        1,
        "namespaces",
        """
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x02000000, 0x80):
    sc("unshare", flag)
sc("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0)
for flag in (0x10000000, 0x00020000, 0x40000000): sc("clone", flag | 17, 0, 0, 0, 0)
sc("clone3", 0, 0)
""",
        lambda seen: seen.words == ["EPERM"] * 10 + ["ENOSYS"],
        differs=(runsc(_EPERM, "its seccomp has one errno for all"),),
    ),
    Attack(
        2,
        "mounts",
        """
b = ctypes.c_char_p
sc("mount", b(b"none"), b(b"/tmp"), b(b"tmpfs"), 0, 0); sc("umount2", b(b"/proc"), 2)
sc("mount", b(b"none"), b(b"/proc"), 0, 32, 0)
sc("pivot_root", b(b"/work"), b(b"/work")); sc("fsopen", b(b"proc"), 0)
sc("open_tree", -100, b(b"/"), 1); sc("move_mount", 0, b(b""), -100, b(b"/tmp"), 4)
sc("mount_setattr", -100, b(b"/"), 0, 0, 0); sc("chroot", b(b"/work"))
""",
        _EPERM,
    ),
    Attack(
        3,
        "kernel interfaces",
        'sc("io_uring_setup", 1, 0); sc("userfaultfd", 0); sc("bpf", 0, 0, 0); '
        'sc("perf_event_open", 0, 0, -1, -1, 0)',
        _EPERM,
    ),
    Attack(
        4,
        "keyrings",
        'sc("keyctl", 0, -3, 0); sc("add_key", 0, 0, 0, 0, 0); sc("request_key", 0, 0, 0, 0)',
        _EPERM,
    ),
    Attack(
        5,
        "ptrace",
        'sc("ptrace", 0, 0, 0, 0); sc("ptrace", 16, 1, 0, 0); sc("process_vm_readv", 1, 0, 0, 0, 0, 0); '
        'sc("process_vm_writev", 1, 0, 0, 0, 0, 0); sc("kcmp", 1, 1, 0, 0, 0); sc("pidfd_getfd", 0, 0, 0)',
        _EPERM,
    ),
    Attack(
        6,
        "host administration",
        'sc("kexec_load", 0, 0, 0, 0); sc("init_module", 0, 0, 0); sc("finit_module", 0, 0, 0); '
        'sc("delete_module", 0, 0); sc("reboot", 0xfee1dead, 672274793, 0, 0); sc("swapon", 0, 0); '
        'sc("syslog", 3, 0, 0); sc("sethostname", 0, 0); sc("settimeofday", 0, 0); sc("acct", 0)\n'
        'if "iopl" in NR: sc("iopl", 3); sc("ioperm", 0, 1, 1)',
        _EPERM,
    ),
    Attack(8, "personality", 'sc("personality", 0x0040000)', _EPERM),
    Attack(
        9,
        "file handles",
        'sc("name_to_handle_at", -100, 0, 0, 0, 0); sc("open_by_handle_at", 3, 0, 0)',
        _EPERM,
    ),
]
if platform.machine() == "x86_64":
    _KERNEL += [
        Attack(
            7,
            "int 0x80",
            _INT80,
            ended("signalled", signal=SIGSYS),
            differs=(
                runsc(lambda seen: int(seen.stdout) < 0, "it has no such calls: an errno, no pid"),
            ),
        ),
        Attack(
            7,
            "x32",
            "sc(0x40000000 | 39)",
            ended("signalled", signal=SIGSYS),
            differs=(runsc(_EPERM, "refused by an errno"),),
        ),
    ]

_FILES = [
    Attack(
        10,
        "mknod",
        'tried(os.mknod, "/work/a", 0o20666, os.makedev(1, 1)); '
        'tried(os.mknod, "/work/b", 0o60666, os.makedev(8, 0)); tried(os.mkfifo, "/work/c")',
        exactly("EPERM EPERM ok"),
    ),
    Attack(12, "writing the root", _FILES_DENIED, _DENIED),
    Attack(
        13,
        "kernel settings",
        'for p in ("sys/kernel/core_pattern", "sys/vm/drop_caches", "sysrq-trigger", '
        '"sys/kernel/modprobe", "sys/kernel/hostname"): tried(write, "/proc/" + p)',
        _DENIED,
    ),
    Attack(13, "masked proc", _MASKED, all_words("0", "EACCES", "EPERM", "ENOENT")),
    Attack(
        14,
        "release agent",
        'print([l for l in open("/proc/self/mountinfo") if "cgroup" in l]); '
        'tried(os.listdir, "/sys/fs/cgroup/memory")',
        exactly("[] ENOENT"),
    ),
    Attack(
        15,
        "hidden places",
        'for p in ("/sys/fs/cgroup", "/sys", "/home", "/var", "/run", "/boot", "/mnt", "/srv", '
        '"/etc/shadow", "/etc/ssh", "/root/.ssh", "/old-root", "/.devices"): tried(os.stat, p)',
        all_words("ENOENT"),
        differs=(
            runsc(
                lambda seen: seen.words == ["ok"] * 2 + ["ENOENT"] * 11, "/sys is its own kernel's"
            ),
        ),
    ),
    Attack(
        16,
        "init of the namespace",
        'for p in ("root", "cwd", "exe", "fd", "mem", "environ", "maps", "ns/mnt"):\n'
        '    tried(lambda: os.open("/proc/1/" + p, os.O_RDONLY))\n'
        'tried(os.readlink, "/proc/1/root")',
        all_words("EACCES", "EPERM"),
        differs=(runsc(all_words("ok", "ENOENT"), OWN_PID_1),),
    ),
    Attack(
        17,
        "the launcher's executable",
        'tried(write, "/proc/1/exe"); tried(os.readlink, "/proc/1/exe"); tried(write, sys.executable)',
        _DENIED,
        differs=(runsc(exactly("EACCES ok EACCES"), OWN_PID_1),),
    ),
    Attack(
        18,
        "inherited descriptors",
        "for fd in range(3, 1024):\n"
        "    try: os.fstat(fd); print(fd)\n"
        "    except OSError: pass\n"
        'print(os.getcwd(), [os.readlink(f"/proc/self/fd/{n}")[:5] for n in range(3)])',
        exactly("/work ['pipe:', 'pipe:', 'pipe:']"),
        differs=(runsc(exactly("/work ['host:', 'host:', 'host:']"), "what it calls our pipes"),),
    ),
    Attack(
        20,
        "setuid programs",
        'lines = [l.split() for l in open("/proc/self/mounts")]\n'
        'print(*[l[1] for l in lines if "nosuid" not in l[3].split(",")], os.getuid() == os.geteuid() > 0)\n'
        'print(os.system("/usr/bin/su -c true </dev/null 2>/dev/null >&2") != 0)',
        exactly("True True"),
        differs=(
            OCI_NOSUID,
            runsc(RUNSC_NOSUID, "mounts of its kernel lack nosuid, which knows no setuid"),
        ),
    ),
    Attack(
        22,
        "memfd exec",
        'fd = os.memfd_create("x", 0)\n'
        'os.write(fd, open("/usr/bin/cat", "rb").read())\n'
        'os.execve(fd, ["cat", "/proc/self/status"], {})',
        lambda seen: "Seccomp:\t2" in seen.stdout and "NoNewPrivs:\t1" in seen.stdout,
        differs=(runsc(lambda seen: "Seccomp:\t2" in seen.stdout, "of 2022 it shows no more"),),
    ),
    Attack(
        45,
        "oom score",
        'tried(write, "/proc/self/oom_score_adj", b"-1000"); print(open("/proc/self/oom_score_adj").read())',
        lambda seen: seen.words == ["EROFS", "600"],
        differs=(runsc(exactly("EROFS 0"), "600 is the host's score of the whole kernel"),),
    ),
]

_OUTPUT = [
    Attack(
        23,
        "symlink result",
        'os.symlink("/etc/passwd", "/work/result")',
        lambda seen: seen.outcome.result is None and bool(seen.outcome.result_refused),
    ),
    Attack(
        25,
        "fifo result",
        'os.mkfifo("/work/result")',
        lambda seen: seen.outcome.result is None and "regular" in seen.outcome.result_refused,
        differs=(runsc(NO_RESULT, "FIFOs exist in its kernel alone"),),
    ),
    Attack(
        25,
        "socket result",
        "import socket\nsocket.socket(socket.AF_UNIX).bind('/work/result')",
        lambda seen: seen.outcome.result is None and bool(seen.outcome.result_refused),
        differs=(runsc(NO_RESULT, "sockets exist in its kernel alone"),),
    ),
    Attack(
        25,
        "directory result",
        'os.mkdir("/work/result")',
        lambda seen: seen.outcome.result is None and bool(seen.outcome.result_refused),
    ),
    Attack(
        26,
        "sparse result",
        'write("/work/result"); os.truncate("/work/result", 1 << 40)',
        lambda seen: seen.outcome.result is None and "at most" in seen.outcome.result_refused,
    ),
    Attack(
        26,
        "hard link result",
        'tried(os.link, "/etc/passwd", "/work/result"); tried(os.link, "/usr/bin/env", "/work/result")',
        lambda seen: seen.outcome.result is None and "ok" not in seen.words,
    ),
]

_NETWORK = [
    Attack(
        28,
        "routes",
        """
import socket
for family, host in ((2, "169.254.169.254"), (2, "127.0.0.1"), (2, "198.51.100.1"), (10, "::1"), (10, "2001:db8::1")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        tried(socket.socket(family, kind).connect, (host, 80))
""",
        all_words("ENETUNREACH", "EADDRNOTAVAIL"),
        differs=(
            runsc(
                lambda seen: (
                    seen.words[2:4] == seen.words[6:8] == ["ECONNREFUSED", "ok"]
                    and set(seen.words[:2] + seen.words[4:6] + seen.words[8:])
                    <= {"ENETUNREACH", "EHOSTUNREACH"}
                ),
                "its loopback is up, with nobody but the job itself on it",
            ),
        ),
    ),
    Attack(
        29,
        "socket families",
        'for family in (16, 17, 38, 40, 44, 30, 29, 31, 3): sc("socket", family, 3, 0)',
        _EPERM,
    ),
    Attack(29, "raw sockets", 'sc("socket", 2, 3, 1); sc("socket", 10, 3, 58)', _EPERM),
]

_RESOURCES = [
    Attack(
        31,
        "fork bomb",
        """
import time
count = 0
while True:
    try: child = os.fork()
    except BlockingIOError: break
    if child == 0: time.sleep(60); os._exit(0)
    count += 1
print(count)
""",
        lambda seen: seen.words == ["15"],
        plan={"pids_max": 16, "memory_bytes": 512 * MIB},  # each takes 10 MiB of gVisor's kernel
        differs=(OCI_PIDS,),
        needs=frozenset({Limit.PIDS}),
    ),
    Attack(
        32,
        "memory bomb",
        "import time\nif os.fork():\n    time.sleep(60)\nblocks = []\n"
        "while True: blocks.append(bytearray(b'x') * (1 << 20))",
        ended("out_of_memory"),
        plan={"memory_bytes": 48 * MIB},
        needs=frozenset({Limit.MEMORY}),
    ),
    Attack(
        33,
        "tmpfs is memory",
        'block = b"x" * (1 << 20)\nfile = open("/tmp/big", "wb")\nfor _ in range(200): file.write(block)',
        ended("out_of_memory"),
        plan={"memory_bytes": 48 * MIB, "tmp_bytes": 512 * MIB},
        needs=frozenset({Limit.MEMORY}),
    ),
    Attack(
        33,
        "memfd is memory",
        'fd = os.memfd_create("x")\nblock = b"x" * (1 << 20)\nfor _ in range(200): os.write(fd, block)',
        ended("out_of_memory"),
        plan={"memory_bytes": 48 * MIB},
        needs=frozenset({Limit.MEMORY}),
    ),
    Attack(
        34,
        "disk fill",
        'for p in ("/tmp/f", "/work/f", "/dev/shm/f"): tried(write, p, b"x" * (3 << 20))',
        exactly("ENOSPC ENOSPC ENOSPC"),
        plan={"tmp_bytes": 2 * MIB, "work_bytes": 2 * MIB, "shm_bytes": 2 * MIB},
    ),
    Attack(
        35,
        "inode fill",
        'def fill():\n    for n in range(200): write(f"/tmp/{n}", b"")\ntried(fill)',
        exactly("ENOSPC"),
        plan={"tmp_inodes": 64},
        differs=(runsc(exactly("ok"), "files of its tmpfs count as the job's memory instead"),),
    ),
    Attack(
        36,
        "descriptors",
        "def fill():\n    for n in range(100): os.dup(0)\ntried(fill)",
        exactly("EMFILE"),
        plan={"open_files_max": 32},
    ),
    Attack(
        36,
        "raising limits",
        "import resource\n"
        "for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):\n"
        "    try: resource.setrlimit(kind, (1 << 20, 1 << 20)); print('raised')\n"
        "    except (ValueError, OSError): print('denied')",
        all_words("denied"),
    ),
    Attack(
        37,
        "cpu hog",
        "while True: pass",
        lambda seen: (
            seen.outcome.cause == "timed_out" and seen.outcome.cpu_ms < seen.outcome.wall_ms // 2
        ),
        plan={"cpu_millis": 100, "wall_ms": 1500, "grace_ms": 0},
        needs=frozenset({Limit.CPU}),
    ),
    Attack(
        37,
        "cpu time of many",
        "trap '' XCPU; for n in 1 2 3 4; do (while :; do :; done) & done; wait",
        lambda seen: seen.outcome.cause == "timed_out" and seen.outcome.detail.startswith("cpu:"),
        plan={"cpu_ms": 300},
        needs=frozenset({Limit.CPU_TIME}),
        shell=True,
    ),
    Attack(
        37,
        "cpu time of one",
        "while True: pass",
        lambda seen: seen.outcome.cause == "timed_out" and seen.outcome.detail.startswith("cpu:"),
        plan={"cpu_ms": 300},
    ),
    Attack(
        37,
        "idle for ever",
        "sleep 4242",
        lambda seen: seen.outcome.cause == "timed_out" and seen.outcome.detail.startswith("idle:"),
        plan={"idle_ms": 300},
        shell=True,
    ),
    Attack(
        37,
        "leaving its cpus",
        "tried(os.sched_setaffinity, 0, range(os.cpu_count())); print(len(os.sched_getaffinity(0)))",
        lambda seen: seen.words[-1:] == ["1"],
        plan={"cpus": (0,)},
        needs=frozenset({Limit.CPUSET}),
    ),
    Attack(
        35,
        "inodes of work",
        'def fill():\n    for n in range(200): write(f"/work/{n}", b"")\ntried(fill)',
        exactly("ENOSPC"),
        plan={"work_inodes": 64},
    ),
    Attack(
        38,
        "output flood",
        "yes | head -c 8000000",
        lambda seen: (
            seen.outcome.cause == "exited"
            and seen.delivered_bytes == 10_000
            and seen.outcome.output_truncated
            and seen.outcome.stdout_bytes == 8_000_000
        ),
        plan={"stdout_bytes_max": 10_000},
        shell=True,
    ),
    Attack(
        39, "unread stdin", "exit 3", ended("exited", exit_code=3), stdin=b"x" * 300_000, shell=True
    ),
    Attack(
        39,
        "closed output",
        "exec >&- 2>&-; sleep 0.05; exit 4",
        ended("exited", exit_code=4),
        shell=True,
    ),
]

_LIFECYCLE = [
    Attack(
        40,
        "daemon that ignores SIGTERM",
        "(trap '' TERM HUP; setsid sh -c \"trap '' TERM; sleep 4242\" &) ; exit 0",
        ended("exited", exit_code=0),
        shell=True,
    ),
    Attack(
        40,
        "job that ignores SIGTERM",
        "trap '' TERM; while :; do sleep 4243; done",
        ended("timed_out"),
        plan={"wall_ms": 200, "grace_ms": 50},
        shell=True,
    ),
    Attack(
        41,
        "stops itself",
        "kill -STOP $$",
        ended("timed_out"),
        plan={"wall_ms": 200, "grace_ms": 50},
        shell=True,
    ),
    Attack(
        42,
        "killing others",
        "tried(os.kill, int(sys.stdin.read()), 9); tried(os.kill, -1, 9)\n"
        "tried(os.kill, 1, 9); print(os.getpid())",  # init ignores or is out of reach; it lives
        lambda seen: (
            seen.words[:2] == ["ESRCH", "ESRCH"]
            and seen.words[2] in {"EPERM", "ok"}
            and seen.outcome.cause == "exited"
        ),
        stdin=b"HOST_PID",
        differs=(
            runsc(
                lambda seen: (
                    seen.words == ["ESRCH", "ESRCH"] and seen.outcome.signal == signal.SIGKILL
                ),
                OWN_PID_1,
            ),
        ),
    ),
    Attack(
        43,
        "zombie farm",
        """
import time
ended, alive = os.pipe()
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0: os._exit(0)
        os._exit(0)
os.close(alive)
for _ in range(20): os.wait()
os.read(ended, 1)  # the grandchildren are dead, too
def zombies():
    states = []
    for p in os.listdir("/proc"):
        if p.isdigit():
            try: states.append(open(f"/proc/{p}/stat").read().split(")")[1].split()[0])
            except OSError: pass
    return states.count("Z")
until = time.monotonic() + 5
while (left := zombies()) and time.monotonic() < until: time.sleep(0.01)
print(left)
""",
        exactly("0"),
        differs=(runsc(exactly("20"), f"{OWN_PID_1}; they count against its pids"),),
        plan={"memory_bytes": 512 * MIB},  # each takes 10 MiB of gVisor's kernel while it lives
    ),
    Attack(
        50,
        "LD_PRELOAD",
        "print('alive')",
        lambda seen: "alive" in seen.stdout and seen.outcome.exit_code == 0,
        plan={"env": {"LD_PRELOAD": "/work/evil.so", "PYTHONSTARTUP": "/work/evil.py"}},
    ),
]

ATTACKS = [*_KERNEL, *_FILES, *_OUTPUT, *_NETWORK, *_RESOURCES, *_LIFECYCLE]
