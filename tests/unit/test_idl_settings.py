"""The cluster file and the environment over it: what is read, and what a mistake says."""

from pathlib import Path

import pytest

from idl.errors import ConfigError
from idl.settings import load_cluster
from idl.units import format_bytes, format_ms, parse_bytes, parse_cpu_millis, parse_ms


def write(folder: Path, text: str, name: str = "cluster.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "pool: p\nkafka: {bootstrap: 'k:1', client: {a.b: c}}\n"
                   "queues: {q: {depth_max: 3}}"),
        ("c.json", '{"pool": "p", "kafka": {"bootstrap": "k:1", "client": {"a.b": "c"}},'
                   ' "queues": {"q": {"depth_max": 3}}}'),
        ("c.toml", 'pool = "p"\n[kafka]\nbootstrap = "k:1"\nclient = {"a.b" = "c"}\n'
                   '[queues.q]\ndepth_max = 3'),
    ],
)  # fmt: skip
def test_three_notations_one_meaning(tmp_path: Path, name: str, text: str) -> None:
    settings = load_cluster(write(tmp_path, text, name), {})
    assert (settings.pool, settings.kafka.bootstrap) == ("p", "k:1")
    assert settings.kafka.client == {"a.b": "c"}
    assert [policy.depth_max for policy in settings.queues.values()] == [3]


def test_every_kafka_setting_passes_through_the_environment(tmp_path: Path) -> None:
    env = {
        "OUTRIDER_KAFKA_BOOTSTRAP": "broker:9093",
        "OUTRIDER_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "OUTRIDER_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "OUTRIDER_KAFKA_SSL_CA_LOCATION": "/ca.pem",
        "OTHER": "x",
    }
    kafka = load_cluster(write(tmp_path, "{pool: p}"), env).kafka
    assert kafka.bootstrap == "broker:9093"
    assert kafka.client == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "ssl.ca.location": "/ca.pem",
    }


@pytest.mark.parametrize(
    ("text", "env", "said"),
    [
        ("[1]", {}, "must be a mapping"),
        ("a: [", {}, "does not parse"),
        ("colour: blue", {}, "colour"),
        ("kafka: {kind: rabbit}", {}, "rabbit"),
        ("pool: a/b", {}, "not a valid name"),
        ("queues: {q: {limits_max: {wall: 1}}}", {}, "limits_max of queue q has 'wall'"),
        ("pool: p", {"OUTRIDER_KAFKA_KIND": "rabbit"}, "OUTRIDER_KAFKA_"),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, text: str, env: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_cluster(write(tmp_path, text), env)
    assert "\n" not in str(caught.value).strip() or "does not parse" in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_cluster(tmp_path / "none.yaml", {})


def test_the_example_in_deploy_is_valid() -> None:
    example = Path(__file__).parents[2] / "deploy" / "cluster.example.yaml"
    settings = load_cluster(example, {})
    assert len(settings.coordinators) == 3


def test_units() -> None:
    assert parse_bytes("512Mi") == 512 << 20
    assert parse_bytes("2G") == 2 * 10**9
    assert parse_bytes(7) == 7
    assert parse_cpu_millis("500m") == 500
    assert parse_cpu_millis("1.5") == 1500
    assert parse_cpu_millis(2) == 2000
    assert parse_ms("250ms") == 250
    assert parse_ms("2m") == 120_000
    assert parse_ms(3) == 3000
    assert format_bytes(268435456) == "256Mi"
    assert format_ms(1500) == "1.5s"
    for parse, bad in ((parse_bytes, "5X"), (parse_cpu_millis, "2Gi"), (parse_ms, "soon")):
        with pytest.raises(ConfigError):
            parse(bad)
