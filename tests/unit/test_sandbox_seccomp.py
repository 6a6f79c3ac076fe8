"""The seccomp filter, run by a small interpreter of classic BPF instead of a kernel."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.sandbox import seccomp
from node_agent.sandbox.seccomp import RET_ALLOW, RET_KILL_PROCESS, AuditArch, Insn, ret_errno

EPERM, ENOSYS = ret_errno(errno.EPERM), ret_errno(errno.ENOSYS)
ARCH = {"x86_64": AuditArch.X86_64, "aarch64": AuditArch.AARCH64}
PROGRAMS = {machine: seccomp.build_filter(machine) for machine in seccomp.MACHINES}


def interpret(program: list[Insn], data: bytes) -> int:
    """Run a filter as the kernel would (bpf(4)); raises on anything the checker would refuse."""
    accumulator, counter = 0, 0
    while True:
        insn = program[counter]
        counter += 1
        if insn.code == 0x20:
            assert insn.k % 4 == 0
            accumulator = struct.unpack_from("=I", data, insn.k)[0]
        elif insn.code == 0x54:
            accumulator &= insn.k
        elif insn.code == 0x06:
            return insn.k
        elif insn.code == 0x05:
            counter += insn.k
        else:
            taken = {
                0x15: accumulator == insn.k,
                0x35: accumulator >= insn.k,
                0x45: bool(accumulator & insn.k),
            }[insn.code]
            counter += insn.jump_true if taken else insn.jump_false


def verdict(machine: str, call: str | int, *args: int, arch: int | None = None) -> int:
    number = seccomp.known_syscalls(machine)[call] if isinstance(call, str) else call
    padded = [value & (2**64 - 1) for value in (*args, 0, 0, 0, 0, 0, 0)][:6]
    audit_arch = ARCH[machine] if arch is None else arch
    return interpret(PROGRAMS[machine], struct.pack("=IIQ6Q", number, audit_arch, 0, *padded))


@pytest.mark.parametrize("machine", seccomp.MACHINES)
class TestEveryMachine:
    def test_ordinary_calls_pass(self, machine: str) -> None:
        for call in [
            "read",
            "write",
            "openat",
            "close",
            "mmap",
            "futex",
            "execve",
            "exit_group",
            "wait4",
            "epoll_pwait",
        ]:
            assert verdict(machine, call) == RET_ALLOW, call

    def test_kernel_surface_is_refused(self, machine: str) -> None:
        calls = (
            "unshare setns mount umount2 pivot_root chroot fsopen open_tree move_mount "
            "mount_setattr io_uring_setup userfaultfd bpf perf_event_open keyctl add_key "
            "request_key ptrace process_vm_readv process_vm_writev name_to_handle_at "
            "open_by_handle_at kexec_load init_module reboot swapon syslog pidfd_getfd kcmp"
        )
        for call in calls.split():
            assert verdict(machine, call) == EPERM, call

    def test_clone3_is_absent_so_that_libc_uses_clone(self, machine: str) -> None:
        assert verdict(machine, "clone3") == ENOSYS

    def test_clone_may_make_threads_and_processes_but_no_namespace(self, machine: str) -> None:
        threads = 0x003D0F00
        assert verdict(machine, "clone", threads) == RET_ALLOW
        assert verdict(machine, "clone", 17) == RET_ALLOW
        for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            assert verdict(machine, "clone", flag | 17) == EPERM, hex(flag)

    def test_socket_families(self, machine: str) -> None:
        for family in range(64):
            expected = RET_ALLOW if family in {1, 2, 10} else EPERM
            assert verdict(machine, "socket", family, 1, 0) == expected, family

    def test_device_nodes_are_refused_but_not_fifos(self, machine: str) -> None:
        for mode, expected in (
            (0o020666, EPERM),
            (0o060666, EPERM),
            (0o010666, RET_ALLOW),
            (0o140666, RET_ALLOW),
            (0o100644, RET_ALLOW),
        ):
            assert verdict(machine, "mknodat", 0, 0, mode) == expected

    def test_personality_and_terminal_injection(self, machine: str) -> None:
        assert verdict(machine, "personality", 0xFFFFFFFF) == RET_ALLOW
        assert verdict(machine, "personality", 0x0040000) == EPERM
        assert verdict(machine, "ioctl", 0, 0x5412) == EPERM
        assert verdict(machine, "ioctl", 0, 0x5401) == RET_ALLOW

    def test_a_foreign_architecture_is_killed(self, machine: str) -> None:
        for arch in (0x40000003, 0x40000028, 0, 0xFFFFFFFF):
            assert verdict(machine, 1, arch=arch) == RET_KILL_PROCESS

    def test_every_jump_stays_inside(self, machine: str) -> None:
        program = PROGRAMS[machine]
        for position, insn in enumerate(program):
            assert 0 <= insn.jump_true <= 255 and 0 <= insn.jump_false <= 255
            if insn.code & 7 == 5:
                reach = insn.k if insn.code == 0x05 else max(insn.jump_true, insn.jump_false)
                assert position + 1 + reach < len(program)
        assert len(seccomp.encode(program)) == 8 * len(program)

    def test_the_tree_agrees_with_the_tables(self, machine: str) -> None:
        """Every number up to well past the last known call, against a plain lookup."""
        names = {number: name for name, number in seccomp.known_syscalls(machine).items()}
        denied = set(seccomp._DENIED.split())
        for number in range(700):
            name = names.get(number)
            if name in seccomp._ARGUMENT_RULES:
                continue
            if name is None or name in seccomp._ABSENT.split():
                expected = ENOSYS
            else:
                expected = EPERM if name in denied else RET_ALLOW
            assert verdict(machine, number) == expected, (number, name)

    def test_what_the_policy_names_exists_somewhere(self, machine: str) -> None:
        known = set(seccomp.known_syscalls("x86_64")) | set(seccomp.known_syscalls("aarch64"))
        for name in (*seccomp._DENIED.split(), *seccomp._ABSENT.split(), *seccomp._ARGUMENT_RULES):
            assert name in known, name


def test_x32_calls_are_killed() -> None:
    for number in (0x40000000, 0x40000000 | 39, 0xFFFFFFFF):
        assert verdict("x86_64", number) == RET_KILL_PROCESS


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_any_input_ends_in_a_verdict(number: int, first: int, second: int) -> None:
    allowed = {RET_ALLOW, EPERM, ENOSYS, RET_KILL_PROCESS}
    for machine in seccomp.MACHINES:
        assert verdict(machine, number, first, second) in allowed


def test_a_machine_without_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.build_filter("riscv64")
