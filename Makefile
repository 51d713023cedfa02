# `make` lists the targets. Settings: MODEL=, EXPERIMENT=, ARGS= (passed to Hydra), ACCEL=cpu|cuda, PYTHON=.

ACCEL ?= $(or $(patsubst .venv/.setup-%,%,$(firstword $(wildcard .venv/.setup-*))),cpu)
MODEL ?=
EXPERIMENT ?=
ARGS ?=
PIPELINE ?= circuit_tracing
LAUNCHER ?= joblib
# Expanded here, once: two uses must name the same folder.
SWEEP := $(or $(SWEEP),runs/sweep/$(shell date +%Y-%m-%d_%H-%M-%S))
export ACCEL

PY := .venv/bin/python
STAMP := .venv/.setup-$(ACCEL)
# A preset of conf/model, or anything that ModelConfig.name takes (a folder, a Hugging Face id, random:llama). Without
# MODEL nothing is passed: what the experiment chooses holds, else the default of conf/config.yaml.
model = $(if $(MODEL),$(if $(wildcard conf/model/$(MODEL).yaml),model=$(MODEL),model.name=$(MODEL)))
package_adapter_serving := preft
package_adapter_quality := quality
package_adapter_rl := rl
package_adapter_parity := parity
package_circuit_tracing := circuits
package_assumption_probing := assumptions
experiment = $(if $(EXPERIMENT),experiment=$(package_$(1))/$(EXPERIMENT))
run = $(PY) -m shared.run pipeline=$(1) $(model) $(experiment) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo preft preft-quality preft-parity preft-rl circuits assumptions sweep bench bench-preft bench-circuits bench-assumptions tinyworld test check format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## virtual environment, exact pins, the four packages (ACCEL=cuda for a GPU)

$(STAMP): requirements/$(ACCEL).txt requirements/overrides-cpu.txt $(wildcard shared/pyproject.toml packages/*/pyproject.toml)
	@scripts/setup

demo: setup ## all three pipelines on the embedded model: one screen of figures, reports in runs/demo
	@$(PY) -m shared.demo $(ARGS)

preft: setup ## prefill-only adapters: train, serve in one vLLM batch (MODEL=, EXPERIMENT=, ARGS=)
	@$(call run,adapter_serving)

preft-quality: setup ## loss of prefill-only adapters by rank, distance and speed, beside rivals (MODEL=, EXPERIMENT=, ARGS=)
	@$(call run,adapter_quality)

preft-parity: setup ## rewards: prefill-only against all-token adapters under one budget (MODEL=, EXPERIMENT=, ARGS=)
	@$(call run,adapter_parity)

preft-rl: setup ## one adapter from rewards: GRPO, rollouts in vLLM (MODEL=, EXPERIMENT=, ARGS=)
	@$(call run,adapter_rl)

circuits: setup ## neuron circuits: attribute, prune, ablate (MODEL=, EXPERIMENT=, ARGS=)
	@$(call run,circuit_tracing)

assumptions: setup ## assumptions about the user: elicit, probe, steer (MODEL=, EXPERIMENT=, ARGS=)
	@$(call run,assumption_probing)

sweep: setup ## runs side by side and one table: PIPELINE=circuit_tracing LAUNCHER=joblib ARGS="run.seed=0,1"
	@$(PY) -m shared.run -m pipeline=$(PIPELINE) $(model) hydra/launcher=$(LAUNCHER) sweep.folder=$(SWEEP) \
		$(call experiment,$(PIPELINE)) $(ARGS)
	@$(PY) -m shared.collect $(SWEEP)

bench: setup ## every benchmark in benchmarks/, results in benchmarks/results
	@for file in $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))); do echo "== $$file"; $(PY) $$file $(ARGS) || exit 1; done

bench-preft: setup ## serving speed of prefill-only adapters: 15 minutes, last line one JSON object (ARGS=--quick: 2)
	@$(PY) benchmarks/preft_serving.py $(ARGS)

bench-circuits: setup ## node scores and edges: speed and memory, 90 seconds, last line one JSON object (ARGS=--only nodes)
	@$(PY) benchmarks/circuits_speed.py $(ARGS)

bench-assumptions: setup ## probes and elicitation at scale, last line one JSON object (ARGS=--help: sizes)
	@$(PY) benchmarks/assumptions_speed.py $(ARGS)

tinyworld: setup ## train the embedded model again from its seeded generator
	@MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 $(PY) -m shared.tinyworld.train $(ARGS)

test: setup ## all tests (ARGS= goes to pytest)
	@$(PY) -m pytest -n 2 --dist loadgroup $(ARGS)

check: setup ## format, lint and types
	@$(PY) -m ruff format --check || { echo "check: run 'make format'" >&2; exit 1; }
	@$(PY) -m ruff check || { echo "check: see above; 'make format' mends part of it" >&2; exit 1; }
	@$(PY) -m mypy || { echo "check: mend the types named above" >&2; exit 1; }

format: setup ## format the code and apply safe lint fixes
	@$(PY) -m ruff check --fix-only --quiet
	@$(PY) -m ruff format

lock: setup ## resolve requirements/*.in into exact pins again
	@scripts/lock

clean: ## remove runs and caches; .venv stays
	rm -rf runs multirun outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
