"""Submitting without Outrider: a plain Kafka producer and a JSON record.

usage: submit_kafka.py BOOTSTRAP [TOPIC] [JOB.json]
"""

import json
import sys
import uuid
from pathlib import Path

from confluent_kafka import KafkaError, Message, Producer


def main(bootstrap: str, topic: str, job: dict[str, object]) -> str:
    """Produces one job; returns its id once Kafka has it on all in-sync replicas."""
    job_id = str(job.setdefault("id", uuid.uuid4().hex))
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failures.append(error)

    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "acks": "all",
            "enable.idempotence": True,
            "max.in.flight": 1,  # with more, the first record for a new topic can get lost
        }
    )
    producer.produce(
        topic,
        json.dumps(job).encode(),
        key=job_id,
        headers={"content-type": "application/json"},
        on_delivery=delivered,
    )
    left = producer.flush(30)
    if failures or left:
        raise SystemExit(f"not submitted: {failures or 'no acknowledgement in time'}")
    return job_id


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    where = sys.argv[2] if len(sys.argv) > 2 else "queue.default"
    spec = (
        json.loads(Path(sys.argv[3]).read_text())
        if len(sys.argv) > 3
        else {
            "command": ["echo", "hello"],
            "resources": {"cpu_millis": 100, "memory_bytes": 67108864},
        }
    )
    sys.stdout.write(main(sys.argv[1], where, spec) + "\n")
