# Every target makes what it needs: a virtual environment in .venv, with the versions pinned in constraints.txt. Set-up
# writes to stderr, so that `make generate ... > answer.txt` holds the answer alone. GNU make 3.81 and POSIX sh suffice.
#
#   PYTHON            interpreters to try for .venv, in this order
#   IDLM_TORCH_INDEX  package index to take torch (and torch alone) from, e.g. one with CPU-only builds
#   ARGS              further arguments for the program behind generate, chat, serve, test and bench

PYTHON ?= python3.13 python3.12 python3.11 python3.10 python3 python
BENCH  ?= generator
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
PINS   := pyproject.toml setup.py constraints.txt
CPU_KERNELS := $(if $(wildcard csrc/build_cpu.py),native-cpu)
TORCH  := $(shell grep '^torch==' constraints.txt)

# The text goes to the program through the environment, exactly as it was given: neither make nor the shell expands it.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: help generate chat serve test test-fast test-engine test-triton test-native lint types native native-cpu bench gpu-report gpu-carry gpu-day wheel clean
.DELETE_ON_ERROR:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

generate: $(VENV)/.installed $(CPU_KERNELS) ## decode text: make generate PROMPT="..." [ARGS="--max-tokens 64 --check"]
	@[ -n "$$PROMPT" ] || { echo 'make generate: no prompt given; write: make generate PROMPT="Why is the sky blue?"' >&2; exit 2; }
	@$(BIN)/idlm generate --prompt="$$PROMPT" $(ARGS)

chat: $(VENV)/.installed $(CPU_KERNELS) ## talk with the default model in the terminal: make chat [ARGS=--show-drafts]
	@$(BIN)/idlm chat $(ARGS)

serve: $(VENV)/.installed-serve $(CPU_KERNELS) ## serve the default model with OpenAI's interface: make serve [ARGS="--port 8001"]
	@$(BIN)/idlm serve $(ARGS)

test: $(VENV)/.installed-dev $(CPU_KERNELS) ## run the tests: make test [ARGS="tests/ops -k rms_norm"]
	@$(BIN)/python -m pytest $(ARGS)

# Lanes, for work; `test` is all of them. Further arguments go to pytest: make test-fast ARGS="-x -k rms_norm"
test-fast: $(VENV)/.installed-dev $(CPU_KERNELS) ## references, operations, CPU backend, models, documents; no default model, some minutes
	@$(BIN)/python -m pytest tests/ref tests/testing tests/ops tests/cpu tests/model tests/fuzz tests/package/test_documents.py \
	  tests/package/test_index.py -m "not slow and not default_model" $(ARGS)

test-engine: $(VENV)/.installed-dev $(CPU_KERNELS) ## generation, command line, server, training, packaging
	@$(BIN)/python -m pytest tests/generate tests/cli tests/serve tests/learning tests/training tests/package $(ARGS)

test-triton: $(VENV)/.installed-dev ## Triton kernels, on the interpreter and the emulator
	@$(BIN)/python -m pytest tests/triton $(ARGS)

test-native: $(VENV)/.installed-dev ## CUDA kernels, on the emulator
	@$(BIN)/python -m pytest tests/native $(ARGS)

lint: $(VENV)/.installed-dev ## check style with ruff
	@$(BIN)/ruff check .

types: $(VENV)/.installed-dev ## check types with mypy
	@$(BIN)/mypy

native-cpu: $(VENV)/.torch ## build the CPU kernels in place, where that is not done; needs a C++ compiler, else says so and goes on
	@$(BIN)/python csrc/build_cpu.py --if-needed || true

native: $(VENV)/.installed-dev ## build the CUDA kernels; needs nvcc 12.4 or newer
	@$(BIN)/python csrc/build.py $(ARGS)
	@$(BIN)/python -c 'import idlm_kernels.native as native; print(native.status())'

bench: $(VENV)/.installed-dev $(CPU_KERNELS) ## run a benchmark of bench/: make bench [BENCH=generator] [ARGS="--threads 2"]
	@$(BIN)/python -m bench.$(BENCH) $(ARGS)

gpu-report: $(VENV)/.installed-dev ## check and time the kernels on this machine's GPU, in minutes
	@$(BIN)/python -m bench.gpu_report $(ARGS)

gpu-carry: ## beforehand, where the code is written: what a GPU machine lacks, into .gpu [ARGS=full: ten minutes]
	@bash bench/gpu_carry.sh $(ARGS)

gpu-day: ## on a machine with an H100: prove and time everything, in eight minutes, with PYTHON=python3 and no .venv
	@# The first interpreter that has torch. The script's status (0 all well, 1 not, 3 no GPU) is make's "Error N": make
	@# itself has no status for a recipe that fails but 2. For the status alone: bash bench/gpu_day.sh
	@for p in $(PYTHON) $(BIN)/python; do "$$p" -c 'import torch' >/dev/null 2>&1 && break; p=; done; \
	[ -n "$$p" ] || for p in $(PYTHON); do command -v "$$p" >/dev/null 2>&1 && break; done; \
	PYTHON="$$p" bash bench/gpu_day.sh $(ARGS)

wheel: $(VENV)/.installed-build ## build dist/*.tar.gz and dist/*.whl; needs neither a GPU nor nvcc
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove the virtual environment and everything that was built or cached here
	rm -rf $(VENV) .softgpu build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: .created (an empty environment), .torch, .installed (the package), .installed-serve (and the server),
# .installed-dev (tests, benches, linters), and .installed-build (what a wheel needs, which is not torch). A stamp is
# written only once its step has succeeded.
$(VENV)/.created:
	@bare=; for p in $(PYTHON); do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue; \
	  "$$p" -c 'import ensurepip, venv' >/dev/null 2>&1 || { bare="$$bare $$p"; continue; }; \
	  echo "creating $(VENV) with $$p" >&2; \
	  "$$p" -m venv $(VENV) >&2 && touch $@; exit; \
	done; \
	if [ -n "$$bare" ]; then \
	  echo "make: found$$bare, but without the venv and ensurepip modules; install them (Debian, Ubuntu: the package python3-venv)" >&2; \
	else \
	  echo "make: Python 3.10 or newer is needed, none of these is: $(PYTHON); name one with: make PYTHON=/path/to/python3" >&2; \
	fi; exit 1

$(VENV)/.torch: $(VENV)/.created constraints.txt
	@$(PIP) install -c constraints.txt setuptools >&2
	@$(PIP) install $(TORCH) $(if $(IDLM_TORCH_INDEX),--no-deps --index-url "$(IDLM_TORCH_INDEX)",-c constraints.txt) >&2
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(PINS)
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[gguf]' >&2
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.torch $(PINS)
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[gguf,serve]' >&2
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.torch $(PINS)
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]' >&2
	@# The headers alone: what the package asks for besides is for its Python side.
	@$(PIP) install --no-deps -c constraints.txt nvidia-cutlass >&2
	@touch $@ $(VENV)/.installed $(VENV)/.installed-serve

$(VENV)/.installed-build: $(VENV)/.created constraints.txt
	@$(PIP) install -c constraints.txt setuptools build >&2
	@touch $@
