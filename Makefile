# make demo   real activations of a real model on real ARC tasks, from nothing, in a few minutes
# make demo-sae   from nothing to a page of features of sparse autoencoders, in ten minutes; TEXTS=file for texts of yours
# make test   the test suite; with EVERY_FAMILY=1, tests that need one model of each port take every family
# make lint   ruff, pyright and shellcheck
# make bench  the benchmark of docs/performance.md; BENCH="--help" for its options

PYTHON ?= python3
BIN := .venv/bin
# Of tests: some wait for what they have started.
PROCESSES = $$($(BIN)/python -c 'import os; print(min(4, (os.cpu_count() or 1) + 2))')
DEMO_OUTPUT := demo_output/activations

.PHONY: demo demo-sae test lint bench clean

demo: .venv/core
	@assets=$$($(BIN)/python launch/demo_assets.py) && \
	$(BIN)/python distributed_inference_with_activations.py --model_path "$$assets/smollm2-135m-instruct.gguf" \
	  --tasks_file "$$assets/arc-agi-1.json" --n_tasks 25 --activations_dir $(DEMO_OUTPUT) --overwrite
	@echo && $(BIN)/jax-extract inspect $(DEMO_OUTPUT)

demo-sae: .venv/core
	@$(BIN)/python launch/demo_sae.py $(if $(TEXTS),--texts "$(TEXTS)")

test: .venv/dev
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck -x -P . $$(find launch -name '*.sh')

bench: .venv/core .venv-peers/ready
	$(BIN)/python benchmarks/extraction.py $(BENCH)

clean:
	rm -rf .venv .venv-peers demo_output build *.egg-info

# The environment; a stamp says what is in it, and a changed pyproject.toml renews it.
.venv/core: pyproject.toml
	@echo "installing jax_extract into .venv (a minute or so)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=python3.11 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/dev: .venv/core
	@echo "installing what the tests need (torch for the comparison with Hugging Face, matplotlib for pictures)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[torch,plots,dev]'
	@touch $@

# The peers of the benchmark, apart from us: what they want of torch and transformers decides nothing here.
.venv-peers/ready: benchmarks/requirements-peers.txt
	@echo "installing the benchmark's peers into .venv-peers (some minutes)"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' $<)
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@
