"""The runnable examples that need no agents: what they produce is a valid submission."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from idl.settings import KafkaSettings
from tests.integration.conftest import create_topics, fresh_settings
from tests.integration.fake_leader import FakeLeader

pytestmark = pytest.mark.kafka
EXAMPLES = Path(__file__).parents[2] / "examples"


def ingested(kafka: KafkaSettings) -> list[str]:
    leader = FakeLeader(kafka)
    try:
        return [str(job) for job in leader.ingest()]
    finally:
        leader.close()


@pytest.mark.parametrize("job", [(), (EXAMPLES / "job.json",)], ids=["built-in", "from-file"])
def test_a_plain_producer_submits(embedded_settings: KafkaSettings, job: tuple[Path, ...]) -> None:
    topic = f"{embedded_settings.prefix}queue.default"
    script = str(EXAMPLES / "submit_kafka.py")
    words = [sys.executable, script, embedded_settings.bootstrap, topic, *map(str, job)]
    made = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ingested(embedded_settings) == [made.stdout.strip()]


@pytest.mark.apache
def test_kcat_submits(request: pytest.FixtureRequest) -> None:
    """On Apache Kafka: kcat 1.7 cannot read Tansu's ApiVersions answer (read underflow)."""
    if shutil.which("kcat") is None:
        pytest.skip("kcat is not installed (Debian: apt-get install kcat)")
    kafka = create_topics(fresh_settings(request.getfixturevalue("apache_broker")))
    topic = f"{kafka.prefix}queue.default"
    words = [str(EXAMPLES / "submit_kcat.sh"), kafka.bootstrap, topic]
    made = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ingested(kafka) == [made.stdout.strip()]
