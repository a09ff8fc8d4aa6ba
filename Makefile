# make train     install into .venv, build the data store, train (ARGS="key=value ..." overrides)
# make test      every test that this machine can run, and by name those it cannot
#                (ARGS="tests/unit -k name" passes on to pytest; ARGS="-m slow" runs the slow ones)
# make test-fast the tests of formulas and files alone, some minutes
# make test-slurm    what needs a SLURM, on a private one (root; slurm-wlm, munge)
# make lint      what is checked before a commit, over all files
# make sweep     measure tokens/s, bytes and memory over lengths and ranks
# make bench     measure beside rivals (ARGS="bench=..." which; see --help)
# make clean     remove .venv and build outputs; runs/ and stores/ stay
#
# PYTHON=python3.12       another interpreter (3.11 is tested)
# TORCH='torch==2.13.0'   the torch requirement as pip takes it; for another build of it (CPU only,
#                         a certain CUDA) add the index that PyTorch's site names:
#                         TORCH='torch==2.13.0 --index-url <address>'
# NPROC=2                 processes that share each sequence
# ACCELERATE_CONFIG=configs/accelerate/gpu_deepspeed_zero1.yaml NPROC=8      on 8 GPUs

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
NPROC ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ACCELERATE_CONFIG ?= configs/accelerate/cpu_deepspeed_zero1.yaml
ON_CPU := $(if $(findstring cpu,$(ACCELERATE_CONFIG)),DS_ACCELERATOR=cpu)
THREADS ?= $(shell n=$$(( $$(nproc) / $(NPROC) )); echo $$(( n > 1 ? n : 1 )))

.PHONY: help install train sweep bench test test-fast test-slurm lint clean FORCE
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(VENV)/installed

# A mistake in ARGS is found by one process, with one line; without ARGS, and with a store, nothing
# stands before the launch. Port 0: a free one, so that two jobs on one machine do not collide.
# Threads: all cores, shared by the ranks.
train: install
	@$(if $(ARGS),$(BIN)/python -m launch train --cfg $(ARGS) > /dev/null)
	@test -e stores/bundled || $(BIN)/python -m launch prepare
	$(ON_CPU) OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch \
	  --config_file $(ACCELERATE_CONFIG) --num_processes $(NPROC) --main_process_port 0 \
	  -m launch.train $(ARGS)

sweep: install
	$(BIN)/python -m launch sweep $(ARGS)

bench: install
	$(BIN)/python -m launch bench $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "unit and not slow" -q $(ARGS)

SLURM_FOLDER ?= /tmp/longfold-slurm

test-slurm: $(VENV)/installed-dev
	tests/slurm/start_cluster.sh $(SLURM_FOLDER) 2 2
	SLURM_CONF=$(SLURM_FOLDER)/slurm.conf $(BIN)/python -m pytest -n0 -m slurm $(ARGS); \
	  code=$$?; tests/slurm/start_cluster.sh --stop $(SLURM_FOLDER); exit $$code

lint: $(VENV)/installed-dev
	$(BIN)/pre-commit run --all-files

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# torch comes first and alone: what is installed then is kept, whichever build it is.
$(VENV)/installed: $(VENV)/torch-choice pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed, this is %d.%d; try PYTHON=python3.11" % sys.version_info[:2])'
	@echo "installing into $(VENV), once (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what the tests need, once (a minute) ..."
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/torch-choice: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
