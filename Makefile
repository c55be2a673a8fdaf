# Everything happens in this checkout: .venv holds the packages, .engine the embedded Triton.
VENV := .venv
BIN := $(VENV)/bin
# The first Python that the embedded Triton can run with; make PYTHON=… chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
# Where a training keeps its features and checkpoints, and where its graphs go.
WORK ?= .training
INTO ?= model-repo
SOURCES := gateway launcher amira_client model-repo backends training tests perf deploy
# What requirements.lock holds; training is left out, since torch is larger than all the rest.
LOCKED := engine models perf tracing fuzz build dev

.DEFAULT_GOAL := help
.PHONY: help setup run demo test lint format eval perf bench windows text data train export peers test-training chaos fuzz soak lock clean

help:  ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

setup: $(VENV)/installed  ## Install the locked packages into .venv

$(VENV)/installed: requirements.lock pyproject.toml
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "make: the embedded Triton needs x86-64 Linux, this is $$(uname -sm); use the Triton container instead (docs/Operations.md)" >&2; exit 1; }
	@test -n "$(PYTHON)" || { echo "make: Python 3.10, 3.11 or 3.12 is needed and none was found; install one, or make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "installing packages into $(VENV) (the first time takes a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: setup  ## Serve on an embedded Triton until Ctrl-C
	@exec $(BIN)/amira run

demo: setup  ## Transcribe the bundled recordings by batch and by live stream
	@exec $(BIN)/amira demo

test: setup  ## Run all tests, on a real Triton with the bundled model
	@tools/system-packages
	@$(BIN)/pytest --cov --cov-report=term

lint: setup  ## Check style and types
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@MYPYPATH=model-repo/detokenizer/1 $(BIN)/mypy model-repo/detokenizer/1/model.py
	@$(BIN)/mypy backends/onnxruntime/model.py
	@$(BIN)/mypy perf/model-repo/frame_synchronous/1/model.py

format: setup  ## Format the code
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

eval: setup  ## Word error rates of batch and streams: make eval SPEECH=dir (recordings and their manifest.tsv)
	@test -n "$(SPEECH)" || { echo "make: say where the labelled recordings are: make eval SPEECH=dir" >&2; exit 1; }
	@$(BIN)/python -m perf.evaluate $(SPEECH)

perf: setup  ## Drive the ensemble with Triton's perf_analyzer: make perf [SPEECH=dir]
	@$(BIN)/python -m perf.analyze $(SPEECH)

$(VENV)/perf-installed: $(VENV)/installed
	@echo "installing what the benchmark needs into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[perf]'
	@touch $@

bench: $(VENV)/perf-installed  ## Measure against the floor and the peers: make bench [SPEECH=dir] [QUICK=1]
	@$(BIN)/python -m perf.bench $(SPEECH) $(if $(QUICK),--quick)

windows: $(VENV)/perf-installed  ## Word error rate and cost of windows by their parts: make windows SPEECH=dir [QUICK=1]
	@test -n "$(SPEECH)" || { echo "make: say where the labelled recordings are: make windows SPEECH=dir" >&2; exit 1; }
	@$(BIN)/python -m perf.windows $(SPEECH) $(if $(QUICK),--quick)

$(VENV)/training-installed: $(VENV)/installed
	@echo "installing what the training needs into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[training]'
	@touch $@

text: $(VENV)/training-installed  ## Gather sentences to speak from packages of Debian: make text [TEXT=file.gz]
	@$(BIN)/python -m training.gather --into $(or $(TEXT),$(WORK)/text.gz)

data: $(VENV)/training-installed  ## Make the speech to train on: make data [SPEECH=dir] [CHOOSE=dir]
	@nice $(BIN)/python -m training.data --work $(WORK) $(if $(SPEECH),--speech $(SPEECH)) $(if $(CHOOSE),--choose $(CHOOSE))

train: $(VENV)/training-installed  ## Train the bundled model, or go on with it: make train [START=repo] [DEVICE=cuda] [MINUTES=60]
	@nice $(BIN)/python -m training.train --work $(WORK) $(if $(START),--begin $(START)) $(if $(DEVICE),--device $(DEVICE)) \
		$(if $(MINUTES),--minutes $(MINUTES))

export: $(VENV)/training-installed  ## Write the trained model's graphs: make export [WORK=dir] [INTO=dir]
	@$(BIN)/python -m training.export --work $(WORK) --into $(INTO)

peers: $(VENV)/training-installed  ## Word error rates of other recognisers: make peers SPEECH=dir
	@test -n "$(SPEECH)" || { echo "make: say where the labelled recordings are: make peers SPEECH=dir" >&2; exit 1; }
	@$(BIN)/python -m training.peers $(SPEECH)

test-training: $(VENV)/training-installed  ## Run a miniature of the whole training, two minutes on idle cores
	@$(BIN)/pytest tests/training

chaos: setup  ## Break a loaded server in every way of docs/Reliability.md, hostile clients included; half an hour
	@$(BIN)/pytest tests/chaos

fuzz: setup  ## Say what nobody would to REST, WebSocket and decoders of audio: make fuzz [MINUTES=10], of each of four
	@MINUTES=$(MINUTES) $(BIN)/pytest tests/fuzz -s

soak: setup  ## Load a server in every way and look whether anything grows: make soak [MINUTES=60]
	@MINUTES=$(MINUTES) $(BIN)/pytest tests/soak -s

lock:  ## Resolve the newest packages into requirements.lock, and those of the image into deploy/
	@$(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml $(LOCKED:%=--extra %) --universal --generate-hashes --no-header \
		--python-version 3.10 --quiet --upgrade --output-file requirements.lock
	@$(BIN)/uv pip compile pyproject.toml --extra tracing --extra build --universal --generate-hashes --no-header --no-annotate \
		--python-version 3.10 --quiet --upgrade --constraint requirements.lock --output-file deploy/requirements.lock

clean:  ## Remove everything that make made
	@rm -rf $(VENV) .engine .training .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz .coverage*
