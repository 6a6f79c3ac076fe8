"""The SDK on asyncio: thousands of jobs awaited without a thread each."""

import asyncio
import sys

from outrider import AsyncClient, Job


async def main() -> None:
    """Uses `$OUTRIDER_CONFIG`, else the local cluster."""
    async with AsyncClient() as client:
        handles = await client.submit(
            Job(["echo", str(number)], cpu="100m", memory="64Mi") for number in range(10)
        )
        ends = await asyncio.gather(*(handle.wait(60) for handle in handles))
        sys.stdout.write(f"{sum(end.succeeded for end in ends)} of {len(ends)} finished\n")


if __name__ == "__main__":
    asyncio.run(main())
