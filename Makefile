# Everything runs in environments of the repository's own; nothing need be installed beforehand but Python 3.11, git and make.
PYTHON ?= python3.11
BIN := .venv/bin
SELDON := .venv-seldon
EDITABLE := -e '.[uvloop,dev,peers]' -e plugins/tf_backend -e plugins/torch_backend -e plugins/balancers -e plugins/tools -e plugins/tfserving -e plugins/seldon -e examples/digits
LOAD_GENERATOR := --manifest-path bench/load_generator/Cargo.toml --target-dir bench/out/load_generator
NATIVE := plugins/native/pyproject.toml $(shell find plugins/native -name target -prune -o \( -name '*.rs' -o -name 'Cargo.*' \) -print)
RUST := $(shell command -v cargo)
PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml examples/*/pyproject.toml)

# For what pyo3 builds without maturin.
export PYO3_PYTHON := $(abspath $(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: help setup load-generator demo demo-tf test test-packages check bench bench-peers soak faults faults-short simulate protos

help: ## list what one can do here
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/native load-generator ## the environment: core, plugins, the example, development tools

.venv/ready: constraints.txt $(PROJECTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt torch $(EDITABLE)
	touch $@

.venv/native: .venv/ready $(NATIVE)
	@if command -v cargo > /dev/null; then \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt maturin && \
	  $(BIN)/python -m pip install --no-build-isolation --no-deps -e plugins/native; \
	else echo "cargo is not installed: going on with the transport grpcio, without the native one"; fi
	touch $@

# Nothing but benchmarks and their tests needs it. Cargo knows what is up to date.
load-generator:
	$(if $(RUST),cargo build --quiet --release --locked $(LOAD_GENERATOR),@echo "cargo is not installed: going on without bench/load_generator")

# seldon-core pins protobuf < 4 and numpy < 2, so it lives in an environment of its own.
$(SELDON)/ready: tests/seldon/requirements.txt
	$(PYTHON) -m venv $(SELDON)
	$(SELDON)/bin/python -m pip install --requirement tests/seldon/requirements.txt
	touch $@

demo: .venv/native ## train, serve and call a model; kill a node under load; TRANSPORT=auto, grpcio or native
	$(BIN)/python -m digits.demo --transport $(or $(TRANSPORT),auto)

demo-tf: .venv/native ## serve a TensorFlow model beside it; drop in its second version under load; TRANSPORT= as above
	$(BIN)/python -m digits.demo_tf --transport $(or $(TRANSPORT),auto)

# Tests wait for about half of their time, so four processes keep two cores busy. Python writes bytecode, since tests start
# some hundred servers.
test: .venv/native $(SELDON)/ready load-generator ## all tests, a file at a time in each of four processes
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -m "not packages" \
	  --numprocesses 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
	$(if $(RUST),cd plugins/native && cargo test --quiet --locked --package dl-inference-grpc --package dl-inference-wire)
	$(if $(RUST),cargo test --quiet --release --locked $(LOAD_GENERATOR))

test-packages: .venv/native ## the distributions: wheels that are built
	$(BIN)/python -m pytest -m packages tests/test_packaging.py

check: .venv/ready ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(RUST),cd plugins/native && cargo fmt --all --check)
	$(if $(RUST),cd plugins/native && cargo clippy --quiet --locked --workspace --all-targets -- -D warnings)
	$(if $(RUST),cargo fmt --check --manifest-path bench/load_generator/Cargo.toml)
	$(if $(RUST),cargo clippy --quiet --locked --all-targets $(LOAD_GENERATOR) -- -D warnings)

bench: .venv/native load-generator ## what a request costs beside plain peers, measured in one run; writes docs/performance.md
	$(BIN)/python -m bench --docs

bench-peers: .venv/native load-generator ## the same models in ours and in other model servers, which it installs first; its part of docs/performance.md
	$(BIN)/python -m bench.model_servers --docs

soak: .venv/native ## ten minutes of all that may happen to a gateway: does anything stay behind? writes docs/soak.md
	$(BIN)/python -m bench.soak --docs

faults: .venv/native ## most of an hour of faults under load, ours beside Envoy and the original; writes docs/reliability.md
	$(BIN)/python -m bench.faults --docs

faults-short: .venv/native ## two minutes of them, of what no run may miss
	$(BIN)/python -m bench.faults --short

simulate: .venv/ready ## every strategy in every scenario under a virtual clock; writes docs/simulation.md
	$(BIN)/python -m bench.simulation --docs

protos: .venv/ready ## dl_inference_core/wire/messages.binpb from protos/
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos --include_imports \
	  --descriptor_set_out=dl_inference_core/wire/messages.binpb $(sort $(wildcard protos/*.proto))
