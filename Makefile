# The commands of the project. Each does its own set-up; nothing has to be installed before but
# Python >= 3.11 with venv (and, for the tests on a real Apache Kafka, a JDK 17 and Maven).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_FLAGS ?=

.PHONY: demo runtimes test test-oci test-vm stress check clean kafka bench lock help

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("outrider needs Python >= 3.11, this is %d.%d; set PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo 'no venv: install it (Debian: apt-get install python3-venv)' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## a local cluster, hundreds of real jobs, hostile ones, a killed leader, an account
	$(BIN)/python -m chaos.demo $(DEMO_FLAGS)

RUNTIMES ?= crun runc

runtimes:  ## the container runtimes that tests run jobs by, as root; without root those tests are skipped
	@missing=$$(for name in $(RUNTIMES); do command -v $$name >/dev/null || echo $$name; done); \
		[ "$$(id -u)" != 0 ] || [ -z "$$missing" ] \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null 2>&1 \
		|| echo $$missing: cannot be installed here, their tests are skipped >&2

test: $(STAMP) runtimes  ## every test: pure cores, properties, real brokers, real sandboxes, the demo
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-oci: RUNTIMES += runsc
test-oci: $(STAMP) runtimes  ## of these the attacks and the sandbox's tests on container runtimes (root)
	$(BIN)/python -m pytest tests/attacks tests/integration/test_sandbox_oci.py tests/integration/test_oci_children.py -k "crun or runc or runsc or backend or oci" $(PYTEST_FLAGS)

test-vm: $(STAMP)  ## the agent's suite in a guest with cgroup v2 and two NUMA nodes (root, apt; 77 = skipped)
	@$(BIN)/python -m tests.vm $(VM_FLAGS) || { code=$$?; [ $$code -eq 77 ] || exit $$code; }

stress: $(STAMP)  ## 2,000 jobs on one agent, a third of them hostile
	OUTRIDER_STRESS_JOBS=2000 $(BIN)/python -m pytest -q tests/e2e/test_stress.py

check: $(STAMP)  ## format, lint, types, who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

kafka: $(STAMP)  ## fetch Apache Kafka's jars, so that `outrider up --kafka apache` starts at once
	$(BIN)/python -c 'from dataplane.broker.apache import fetch_jars; print(fetch_jars(print))'

bench: $(STAMP)  ## sandboxes beside bubblewrap and crun, throughput on both brokers, the leader's own part, losing the leader beside etcd, a thousand nodes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m benchmarks.sandbox
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.decisions
	$(BIN)/python -m benchmarks.failover
	$(BIN)/python -m benchmarks.peace
	$(BIN)/python -m benchmarks.dds_scale

lock: $(STAMP)  ## write constraints.txt from what is installed
	$(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check > constraints.txt

clean:  ## remove what the commands made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
