"""Job files: what they may hold, what they become, and how a mistake is told."""

from pathlib import Path

import pytest

from idl.codec import decode_spec, encode_json
from idl.errors import ConfigError
from idl.jobs import network_of, required_labels, required_limits
from outrider.client.jobfile import parse_jobs, read_job_file


def test_one_job_in_the_short_form() -> None:
    (found,) = parse_jobs(
        """
command: echo "hello world"
id: hi
queue: fast
cpu: 500m
memory: 64Mi
timeout: 30s
retries: 0
env: {LEVEL: 3, DEBUG: true}
node_labels: {zone: a}
image: alpine
allow_unenforced: [network]
""",
        "here",
    )
    spec = found.spec
    assert found.queue == "fast"
    assert spec.command == ("echo", "hello world")
    assert (spec.resources.cpu_millis, spec.resources.memory_bytes) == (500, 64 * 2**20)
    assert (spec.limits.wall_ms, spec.retry.max_attempts) == (30_000, 1)
    assert spec.env == {"LEVEL": "3", "DEBUG": "true"}
    assert spec.image == "alpine"
    assert "network" not in spec.isolation.require
    assert "memory" in spec.isolation.require


@pytest.mark.parametrize(
    "written", ["1.10", "010", "0x1F", "1_000", "+5", "3.0", "yes", "True", "2024-01-01", "1:30"]
)
def test_a_text_is_what_was_written_not_what_yaml_reads(written: str) -> None:
    (found,) = parse_jobs(
        f"command: [x, {written}]\nargs: [{written}]\nenv: {{A: {written}}}\n"
        f"node_labels: {{{written}: {written}}}\ninputs: {{a: {written}, b: {{text: {written}}}}}",
        "f",
    )
    spec = found.spec
    assert spec.command == ("x", written, written)
    assert (spec.env, spec.node_labels) == ({"A": written}, {written: written})
    assert {given.data for given in spec.inputs.values()} == {written.encode()}


def test_numbers_of_json_and_a_program_called_true() -> None:
    (found,) = parse_jobs('{"command": "x", "env": {"A": 1.10, "B": false}}', "f", suffix=".json")
    assert found.spec.env == {"A": "1.10", "B": "false"}
    (found,) = parse_jobs("{command: true, cpu: 1.50, memory: 64_000_000, exclusive: yes}", "f")
    assert found.spec.command == ("true",)
    assert found.spec.resources.cpu_millis == 1500
    assert found.spec.resources.memory_bytes == 64_000_000
    assert found.spec.exclusive
    (found,) = parse_jobs("{command: [x], v: 1, resources: {cpu_millis: 250}}", "f")
    assert found.spec.resources.cpu_millis == 250


def test_defaults_a_list_several_documents_and_json_lines() -> None:
    with_defaults = parse_jobs(
        "defaults: {cpu: 2, group: g}\njobs:\n  - {command: [a]}\n  - {command: [b], cpu: 1}", "f"
    )
    assert [job.spec.resources.cpu_millis for job in with_defaults] == [2000, 1000]
    assert {job.spec.group for job in with_defaults} == {"g"}
    assert len(parse_jobs("- {command: [a]}\n- {command: [b]}", "f")) == 2
    assert len(parse_jobs("command: a\n---\ncommand: b\n---\n", "f")) == 2
    lines = '{"command": ["a"]}\n\n{"command": ["b"]}\n'
    assert len(parse_jobs(lines, "f", suffix=".jsonl")) == 2
    assert len(parse_jobs('{"jobs": [{"command": ["a"]}]}', "f", suffix=".json")) == 1


def test_the_wire_form_is_taken_as_it_is() -> None:
    (found,) = parse_jobs(
        '{"v": 1, "command": ["cat"], "resources": {"cpu_millis": 250}, "payload": "aGk="}',
        "f",
        suffix=".json",
    )
    assert found.spec.resources.cpu_millis == 250
    assert found.spec.payload == b"hi"
    assert decode_spec(encode_json(found.spec)) == found.spec


def test_files_named_in_a_job_file_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"input")
    (tmp_path / "run.py").write_text("#!/usr/bin/env python3\nprint(1)\n")
    path = tmp_path / "jobs.yaml"
    path.write_text("- {command: cat, payload_file: in.txt}\n- {script_file: run.py, args: [1]}\n")
    first, second = read_job_file(path)
    assert first.spec.payload == b"input"
    assert second.spec.command == ("python3", "-", "1")
    assert second.spec.payload is not None
    assert second.spec.payload.startswith(b"#!")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("comand: echo", "unknown key 'comand'; did you mean 'command'?"),
        ("command: [echo]\nzebra: 1", "unknown key 'zebra'; see docs"),
        ("command: [echo]\ncpu: many", "cpu 'many' is not a quantity"),
        ("command: [echo]\ncpu: 0", "resources.cpu_millis is 0"),
        ("command: [echo]\nid: 'a b'", "id 'a b' is not a name"),
        ("command: [echo]\nqueue: 'a b'", "queue 'a b' is not a name"),
        ("command: [echo]\nretries: -1", "retries is -1"),
        ("command: [echo]\nretry_on: [whim]", "retry_on has 'whim'"),
        ("command: [echo]\nrequire: [magic]", "require has 'magic'"),
        ("command: [echo]\nnetwork: wifi", "network has 'wifi'"),
        ("command: [echo]\nscript: 'true'", "either script, or command"),
        ("command: [echo]\npayload: a\npayload_file: b", "both payload and payload_file"),
        ("command: [echo]\npayload_file: missing", "cannot read payload missing"),
        ("command: [echo]\ngpus: lots", "Expected `int`, got `str`"),
        ("command: [echo]\nenv: [a]", "env is a mapping"),
        ("command: [echo]\nenv: {DEBUG: }", "env DEBUG has no value; write '' for an empty text"),
        ("command: [echo]\nenv: {DEBUG: null}", "env DEBUG has no value"),
        ("command: [echo]\nenv: {A: [1, 2]}", "env A is a list, not a text; quote it"),
        ("command: [echo, null]", "command 2 has no value"),
        ("command: [echo]\ninputs: {a: }", "input a has no value"),
        ("command: [echo]\nargs: --epochs 3", "args is a list of strings, not the string"),
        ("command: [echo]\nargs: 3", "args is a list of strings, not the string"),
        ("command: [echo]\nargs: {a: b}", "args is a dict"),
        ("command: [echo]\noutputs: report.txt", "outputs is a list of strings, not the string"),
        ("command: [echo]\nrequire: memory", "require is a list of strings"),
        ("command: [echo]\nenv: {A: 2024-05-32}", "does not parse"),
        ("cpu: 1", "needs command"),
        ("script: '#!/usr/bin/awk -f'", "'awk' is not known to read"),
        ("script: '#!/usr/bin/env'", "names no program"),
        ("{command: [echo], resources: {}, cpu: 1}", "mixes the wire form (resources)"),
        ("{command: [echo], resources: {cpu_millis: x}}", "Expected `int`"),
        ("{command: [echo], v: 1, zebra: 2}", "unknown key 'zebra'"),
        ("{command: [echo], v: 1, queue: 'a b'}", "queue 'a b'"),
        ("jobs: []\nzebra: 1", "'zebra' beside 'jobs'"),
        ("jobs: []", "holds no job"),
        ("", "holds no job"),
        ("just text", "a job is a mapping"),
        ("a: [", "does not parse"),
    ],
)
def test_a_mistake_is_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_jobs(text, "here.yaml")
    message = str(caught.value)
    assert told in message
    assert message.startswith("here.yaml")
    assert "\n" not in message


@pytest.mark.parametrize("more", ["", ', "v": 1'])
def test_half_a_character_of_json_is_told(more: str) -> None:
    with pytest.raises(ConfigError, match=r"here: .* is not UTF-8 text"):
        parse_jobs(rf"""{{"command": ["\ud800"]{more}}}""", "here", suffix=".json")


def test_the_job_that_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"here, job 2: cpu 'x'"):
        parse_jobs("- {command: a}\n- {command: b, cpu: x}", "here")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_job_file(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_job_file(binary)


def test_inputs_and_outputs_and_limits_of_the_short_form(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"1,2\n")
    (tmp_path / "jobs.yaml").write_text(
        """
command: [sort]
inputs:
  note.txt: hello
  number: 7
  data/a.csv: {file: data.csv}
  own.cfg: {text: "x", writable: true}
outputs: [report.txt, plots/]
cpu_time: 10s
idle: 1m
io_read: 10Mi
log: 2Mi
profile: network
"""
    )
    (found,) = read_job_file(tmp_path / "jobs.yaml")
    spec = found.spec
    assert {name: given.data for name, given in spec.inputs.items()} == {
        "note.txt": b"hello", "number": b"7", "data/a.csv": b"1,2\n", "own.cfg": b"x",
    }  # fmt: skip
    assert [name for name, given in spec.inputs.items() if given.writable] == ["own.cfg"]
    assert spec.outputs == ("report.txt", "plots/")
    limits = spec.limits
    assert (limits.cpu_ms, limits.idle_ms) == (10_000, 60_000)
    assert (limits.io_read_bytes_per_s, limits.output_bytes) == (10 << 20, 2 << 20)
    assert network_of(spec) == "host"
    assert {"cpu_time", "io"} <= set(required_limits(spec))
    assert "network" not in required_limits(spec)
    assert required_labels(spec) == {"host-network": "allowed"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("inputs: [a]", "mapping"),
        ("inputs: {a: {file: x, text: y}}", "one of"),
        ("inputs: {a: {writable: true}}", "one of"),
        ("inputs: {a: {fil: x}}", "file"),
        ("inputs: {a: {file: no-such-file}}", "no-such-file"),
        ("inputs: {../a: x}", "relative path"),
        ("outputs: [/etc/passwd]", "below /work"),
        ("outputs: [a/../../b]", "below /work"),
        ("idle: -1", "duration"),
        ("open_files: 1", "open_files"),
        ("profile: loose", "profile"),
    ],
)
def test_a_wrong_input_or_limit_is_told(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_jobs(f"command: [x]\n{text}\n", "f")
