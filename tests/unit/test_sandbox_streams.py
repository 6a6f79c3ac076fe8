"""A job's output as the agent reads it: pieces are bounded, bytes are all there."""

import asyncio
import os

from node_agent.sandbox import streams
from node_agent.sandbox.streams import SMALL_READS_FREE, OutputPump


async def until_it_pauses(pump: OutputPump, write: int) -> None:
    while pump._pause is None:
        os.write(write, b"x")
        await asyncio.sleep(0)


async def test_single_bytes_become_few_pieces() -> None:
    """Whoever writes byte by byte is read a hundred times a second, not each time."""
    read, write = os.pipe()
    pieces: list[bytes] = []
    pump = OutputPump(read, 1 << 20, pieces.append)
    turns = 0
    while turns < 2_000:  # each turn of the loop finds one byte
        os.write(write, b"x")
        await asyncio.sleep(0)
        turns += 1
    before = len(pieces)
    assert SMALL_READS_FREE <= before < turns / 4
    pump.hurry()
    os.close(write)
    await pump.done
    assert b"".join(pieces) == b"x" * turns and pump.bytes_seen == turns


async def test_the_end_of_a_job_ends_the_pause() -> None:
    read, write = os.pipe()
    pump = OutputPump(read, 1 << 20, None)
    await until_it_pauses(pump, write)
    os.close(write)
    pump.hurry()
    assert pump._pause is None
    await pump.done


async def test_a_flood_is_read_in_large_pieces_without_a_pause() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    pieces: list[bytes] = []
    pump = OutputPump(read, 1 << 24, pieces.append)
    total = 0
    while total < 1 << 20:
        try:
            total += os.write(write, bytes(65_536))
        except BlockingIOError:
            assert pump._pause is None, "what is large is never delayed"
            await asyncio.sleep(0)
    os.close(write)
    await pump.done
    assert sum(map(len, pieces)) == total


async def test_a_pump_closed_in_its_pause_reads_no_more() -> None:
    read, write = os.pipe()
    pump = OutputPump(read, 1 << 20, None)
    await until_it_pauses(pump, write)
    pump.close()
    await asyncio.sleep(2 * streams.PAUSE_S)
    assert pump.done.done() and pump._pause is None
    os.close(write)
