"""The few machine instructions that run a list of system calls.

A job's init is a fork of the launcher. Written in Python, most of its time went into copying the
pages that the interpreter touches (``docs/benchmarks.md``); what it has to *do* is a fixed list of
system calls that the launcher can work out beforehand. So init runs such a list (``program.py``)
by the loop below, and touches a handful of pages (ADR 0016).

A list is an array of records of twelve 64-bit words::

    number  a1 a2 a3 a4 a5 a6  store  expected  if_equal  if_error  otherwise

The call is made, its result written to the address ``store``, and the next record is the one at
``if_equal`` if the result is ``expected``, at ``if_error`` if it is an error (-4095 to -1; then the
record's address and the result are noted at ``fault`` first), else at ``otherwise``. Numbers below
zero are no system calls: see LEAVE, MINUS, LOAD.

Loop and records use registers and the record's own words alone: no stack, no libc. So it may run
in a child that shares memory with its parent (vfork), and where libc's idea of the thread is stale
(after a raw clone3).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

LEAVE = -1  # return from ``run``
MINUS = -2  # result: a1 - a2
LOAD = -3  # result: the word at address a1

WORDS = 12
RECORD_BYTES = 8 * WORDS
# Offsets of words within a record.
ARGUMENT, STORE, EXPECTED, IF_EQUAL, IF_ERROR, OTHERWISE = 1, 7, 8, 9, 10, 11

# run(rdi: first record, rsi: fault); GNU as, intel_syntax. syscall(2): arguments in rdi, rsi, rdx,
# r10, r8, r9; rcx and r11 are lost.
X86_64_SOURCE = """
run:
    push rbx
    push r12
    mov rbx, rdi
    mov r12, rsi
next:
    mov rax, [rbx]
    mov rdi, [rbx+8]
    mov rsi, [rbx+16]
    test rax, rax
    js special
    mov rdx, [rbx+24]
    mov r10, [rbx+32]
    mov r8, [rbx+40]
    mov r9, [rbx+48]
    syscall
done:
    mov rcx, [rbx+56]
    mov [rcx], rax
    cmp rax, [rbx+64]
    je equal
    cmp rax, -4095
    jae error
    mov rbx, [rbx+88]
    jmp next
equal:
    mov rbx, [rbx+72]
    jmp next
error:
    mov [r12], rbx
    mov [r12+8], rax
    mov rbx, [rbx+80]
    jmp next
special:
    cmp rax, -1
    je leave
    cmp rax, -2
    je minus
    mov rax, [rdi]
    jmp done
minus:
    mov rax, rdi
    sub rax, rsi
    jmp done
leave:
    pop r12
    pop rbx
    ret
"""
X86_64 = bytes.fromhex(
    "5341544889fb4989f4488b03488b7b08488b73104885c07842488b53184c8b53204c8b43284c8b4b"
    "300f05488b4b38488901483b4340740e483d01f0ffff730c488b5b58ebc3488b5b48ebbd49891c24"
    "4989442408488b5b50ebae4883f8ff74134883f8fe7405488b07ebbf4889f84829f0ebb7415c5bc3"
)

# run(x0: first record, x1: fault). svc: arguments in x0 to x5, number in x8; all others are kept.
AARCH64_SOURCE = """
run:
    mov x9, x0
    mov x10, x1
next:
    ldr x8, [x9]
    ldp x0, x1, [x9, #8]
    ldp x2, x3, [x9, #24]
    ldp x4, x5, [x9, #40]
    tbnz x8, #63, special
    svc #0
done:
    ldp x11, x12, [x9, #56]
    str x0, [x11]
    cmp x0, x12
    b.eq equal
    cmn x0, #4095
    b.hs error
    ldr x9, [x9, #88]
    b next
equal:
    ldr x9, [x9, #72]
    b next
error:
    stp x9, x0, [x10]
    ldr x9, [x9, #80]
    b next
special:
    cmn x8, #1
    b.eq leave
    cmn x8, #2
    b.eq minus
    ldr x0, [x0]
    b done
minus:
    sub x0, x0, x1
    b done
leave:
    ret
"""
AARCH64 = bytes.fromhex(
    "e90300aaea0301aa280140f9208540a9228d41a9249542a9e801f8b7010000d42bb143a9600100f9"
    "1f000ceba00000541ffc3fb1a2000054292d40f9f3ffff17292540f9f1ffff17490100a9292940f9"
    "eeffff171f0500b1e00000541f0900b160000054000040f9eeffff17000001cbecffff17c0035fd6"
)
CODE = {"x86_64": X86_64, "aarch64": AARCH64}


# Where things lie in the executable and in the process that it becomes. Pages may have 64 KiB.
CODE_BASE, DATA_BASE = 0x1000_0000, 0x2000_0000
_PAGE = 0x10000
_CODE_AT = 256
_ELF_MACHINE = {"x86_64": 62, "aarch64": 183}


def executable(machine: str, first: int, fault: int, data: bytes, data_bytes: int) -> bytes:
    """A static program (elf(5)) that runs the list at ``first``: the loop, and memory of
    ``data_bytes`` at DATA_BASE, which begins with ``data``. Raises OSError for a machine that the
    loop is not written for."""
    if machine not in CODE:
        raise OSError(errno.ENOSYS, f"no system call loop for {machine}")
    code = _stub(machine, first, fault) + CODE[machine]
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, _ELF_MACHINE[machine], 1,
        CODE_BASE + _CODE_AT, 64, 0, 0, 64, 56, 3, 0, 0, 0,
    )  # fmt: skip
    load, stack = 1, 0x6474E551
    readable, writable, runnable = 4, 2, 1
    size = _CODE_AT + len(code)
    segments = [
        (load, readable | runnable, 0, CODE_BASE, CODE_BASE, size, size, _PAGE),
        (load, readable | writable, _PAGE, DATA_BASE, DATA_BASE, len(data), data_bytes, _PAGE),
        (stack, readable | writable, 0, 0, 0, 0, 0, 16),
    ]
    text = header + b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)
    return (text.ljust(_CODE_AT, b"\0") + code).ljust(_PAGE, b"\0") + data


def _stub(machine: str, first: int, fault: int) -> bytes:
    """The two arguments of ``run`` into their registers; both are below 4 GiB."""
    if machine == "x86_64":  # mov edi, first; mov esi, fault
        return struct.pack("<BIBI", 0xBF, first, 0xBE, fault)
    words = []
    for register, value in enumerate((first, fault)):  # movz, movk with lsl 16
        words.append(0xD2800000 | (value & 0xFFFF) << 5 | register)
        words.append(0xF2A00000 | (value >> 16) << 5 | register)
    return struct.pack("<4I", *words)


_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_FIXED_NOREPLACE = 2, 0x20, 0x100000


def run_here(program_fd: int, image: bytes, bytes_: int, first: int, fault: int) -> Memory:
    """The same in this process, which goes on where the list says LEAVE. Raises OSError."""
    memory = Memory(_map(DATA_BASE, bytes_, _PROT_READ | _PROT_WRITE, -1), bytes_)
    memory.write(DATA_BASE, image)
    code = _map(0, _PAGE, _PROT_READ | _PROT_EXEC, program_fd) + _CODE_AT
    code += len(_stub(os.uname().machine, 0, 0))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(code)(first, fault)
    return memory


class Memory:
    """Memory at a fixed address."""

    def __init__(self, base: int, size: int) -> None:
        self._base = base
        self._bytes = memoryview((ctypes.c_char * size).from_address(base)).cast("B")

    def write(self, address: int, content: bytes) -> None:
        """Puts bytes there."""
        at = address - self._base
        self._bytes[at : at + len(content)] = content

    def number(self, address: int) -> int:
        """The signed word there."""
        at = address - self._base
        return int.from_bytes(self._bytes[at : at + 8], "little", signed=True)


def _map(address: int, size: int, protection: int, fd: int) -> int:
    """mmap(2), private; at ``address`` if it is not 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    flags = _MAP_PRIVATE
    flags |= _MAP_ANONYMOUS if fd < 0 else 0
    flags |= _MAP_FIXED_NOREPLACE if address else 0
    found: int | None = libc.mmap(address, size, protection, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value or (address and found != address):
        number = ctypes.get_errno() or errno.EEXIST
        raise OSError(number, f"mmap: {os.strerror(number)}")
    return found
