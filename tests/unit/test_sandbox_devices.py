"""The device program, run by a small interpreter of the few eBPF instructions it uses."""

from __future__ import annotations

import struct

from node_agent.launcher import devices

CHAR, BLOCK = 2, 1
MKNOD, READ, WRITE = 1, 2, 4


def interpret(code: bytes, kind: int, access: int, major: int, minor: int) -> int:
    context = struct.pack("<III", access << 16 | kind, major, minor)
    registers = [0] * 11
    position = 0
    while True:
        op, regs, offset, imm = struct.unpack_from("<BBhi", code, position * 8)
        dst = regs & 15
        position += 1
        match op:
            case 0x61:
                assert regs >> 4 == 1
                registers[dst] = struct.unpack_from("<I", context, offset)[0]
            case 0xB7:
                registers[dst] = imm
            case 0x57:
                registers[dst] &= imm
            case 0x77:
                registers[dst] >>= imm
            case 0x95:
                return registers[0]
            case 0x15:
                position += offset if registers[dst] == imm else 0
            case 0x55:
                position += offset if registers[dst] != imm else 0
            case 0x45:
                position += offset if registers[dst] & imm else 0
            case _:
                raise AssertionError(f"unexpected instruction {op:#x}")


def test_only_listed_character_devices_open() -> None:
    code = devices.program([(1, 3), (195, 0)])
    for major, minor, expected in ((1, 3, 1), (195, 0, 1), (195, 1, 0), (1, 1, 0), (3, 1, 0)):
        for access in (READ, WRITE, READ | WRITE):
            assert interpret(code, CHAR, access, major, minor) == expected
            assert interpret(code, BLOCK, access, major, minor) == 0


def test_no_node_can_be_made_not_even_a_listed_one() -> None:
    code = devices.program([(1, 3)])
    for access in (MKNOD, MKNOD | READ, MKNOD | WRITE):
        assert interpret(code, CHAR, access, 1, 3) == 0


def test_an_empty_list_allows_nothing() -> None:
    assert interpret(devices.program([]), CHAR, READ, 1, 3) == 0
