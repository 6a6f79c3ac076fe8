"""The SDK: submit, wait, fetch; many jobs; a function as jobs."""

import sys
from functools import partial

from outrider import Client, Job, JobFailedError


def square(item: int) -> int:
    """Runs on a node: what it needs it imports itself."""
    return item * item


def main() -> None:
    """Uses `$OUTRIDER_CONFIG`, else the local cluster."""
    small = partial(Job, cpu="100m", memory="64Mi", timeout="30s")
    with Client() as client:
        handle = client.submit(small(["sh", "-c", "cat > $OUTRIDER_RESULT"], payload="hi"))
        sys.stdout.write(f"{handle.job}: {handle.result(timeout=60).decode()}\n")

        handles = client.submit(small(["echo", str(number)]) for number in range(10))
        for ended in client.as_ended(handles, timeout=60):
            sys.stdout.write(f"{ended.job} {ended.status().phase}\n")

        try:
            client.submit(small(["false"], retries=0)).result(timeout=60)
        except JobFailedError as error:
            sys.stdout.write(f"as expected: {error.outcome}, exit code {error.exit_code}\n")

        sys.stdout.write(f"{list(client.map(square, range(5), cpu='100m', memory='64Mi'))}\n")


if __name__ == "__main__":
    main()
