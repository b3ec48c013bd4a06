# `make help` lists the targets. A fresh machine needs python3 (3.10 or later, with venv), a C++17 compiler and make.
#
#   PYTHON  interpreter that the environment is made from
#   TORCH   requirement installed where the environment has no torch yet; given to make, it replaces the one there
#   FUZZ_SECONDS  how long `make fuzz` runs, by default 600
#   STRESS_STEPS  how many layer steps `make stress` does, by default a million
#   BENCH_OUTPUT  folder where `make bench` also writes its figures as JSON, such as bench/results
#   DCEXT_CUDA, DCEXT_ZSTD_DIR, DCEXT_XXHASH_DIR, DCEXT_CACHE, MAX_JOBS  see setup.py and third_party/README.md

PYTHON ?= python3
TORCH ?= torch==2.13.0
FUZZ_SECONDS ?= 600
STRESS_STEPS ?= 1000000
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
BUILD_REQUIRES := 'setuptools>=77' 'pybind11>=2.13' wheel ninja numpy
CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# These give recipe paper the ratio 2.2 on SmolLM2-135M-Instruct.
PAPER_ALPHA := 0.5
PAPER_SPARSITY := 0.45
# Objects survive a change of these, so the extension is linked anew when one differs from the last build.
BUILD_KEY := $(TORCH) $(DCEXT_CUDA) $(DCEXT_ZSTD_DIR) $(DCEXT_XXHASH_DIR) $(TORCH_CUDA_ARCH_LIST) $(CC) $(CXX)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test pytest lint format build fuzz stress bench families generation quality zeroshot clean distclean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "%-10s %s\n", $$1, $$2}'

demo: build  ## compress, verify, measure and run a real model (downloads 132 MB the first time)
	@$(PY) bench/demo.py

test: build lint pytest  ## environment, build, lint, types, tests

pytest: build  ## the tests alone, in two processes of one thread
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: $(VENV)/stamp-dev  ## ruff, clang-format and mypy, without changing anything
	@$(BIN)/ruff check -q --no-cache .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	@$(BIN)/mypy --no-error-summary
	@echo "lint: clean"

format: $(VENV)/stamp-dev  ## ruff and clang-format, in place
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $(CPP_FILES)

build: $(VENV)/stamp-dev  ## environment and extension, incrementally
	@mkdir -p build
	@echo '$(BUILD_KEY)' | cmp -s - build/key || { rm -f dcext/_C*.so; echo '$(BUILD_KEY)' > build/key; }
	@$(PY) setup.py build_ext --inplace > build/log 2>&1 || \
	  { grep -E -A 4 'error:|^error|^Error' build/log || tail -n 40 build/log; echo 'the whole log: build/log'; exit 1; }

fuzz: build  ## fuzz the seek index under sanitizers; what finds new code goes to tests/fuzz/corpus
	@program=$$($(PY) tests/fuzz/build.py) || { echo "$$program"; exit 1; }; seed=$$(date +%s); \
	echo "seed $$seed"; cd build/fuzz && \
	$$program fuzz --seconds $(FUZZ_SECONDS) --seed $$seed --corpus $(CURDIR)/tests/fuzz/corpus

stress: $(VENV)/stamp-dev  ## a million steps of weight streams under ThreadSanitizer (a quarter of an hour on two cores)
	@program=$$($(PY) tests/stream/build.py thread) || { echo "requires $$program"; exit 1; }; seed=$$(date +%s); \
	echo "seed $$seed"; cd build/stream && \
	TSAN_OPTIONS=halt_on_error=1 $$program --steps $(STRESS_STEPS) --seed $$seed

bench: build  ## all benchmarks, with their hardware line
	@for script in bench/bench_*.py; do \
	  DCEXT_BENCH_OUTPUT=$(BENCH_OUTPUT) $(PY) -m pytest -q -p no:cacheprovider -o python_files='bench_*.py' \
	    --benchmark-enable --benchmark-disable-gc --benchmark-quiet $$script || exit 1; \
	done

families: build  ## every family of models under every recipe, and docs/FAMILIES.md (an hour on two cores; goes on where it was)
	@$(PY) bench/families.py

generation: build  ## whole models at batch 1, beside llama.cpp, which is built first (an hour on two cores)
	@$(PY) bench/generation.py

quality: build  ## perplexity and divergence over bits per weight, beside peers (hours on two cores)
	@$(PY) bench/quality/run.py

zeroshot: build  ## multiple-choice accuracy of float, INT8, paper and rate (an hour on two cores)
	@$(PIP) -c $(VENV)/constraints.txt -e '.[zeroshot]' --no-build-isolation
	@model=$$($(PY) third_party/fetch.py smollm2 --print-path); \
	text=$$($(PY) third_party/wiki_text.py calibration --print-path); \
	compress() { test -d build/zeroshot/$$1 || $(BIN)/dcext compress $$model -o build/zeroshot/$$@ > /dev/null; }; \
	compress int8 --recipe int8 && \
	compress rate --ratio 2.2 --calibration $$text && \
	compress paper --recipe paper --alpha $(PAPER_ALPHA) --sparsity $(PAPER_SPARSITY) --calibration $$text && \
	$(PY) bench/zeroshot.py --model float=$$model --model INT8=build/zeroshot/int8 \
	  --model paper=build/zeroshot/paper --model rate=build/zeroshot/rate --output bench/results/zeroshot.json

clean:  ## remove what was built
	rm -rf build dist *.egg-info dcext/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f $(VENV)/stamp-dev
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## and the environment; downloads stay in the cache
	rm -rf $(VENV) .venv-peers .venv-llama

ifneq ($(origin TORCH),file)
.PHONY: $(VENV)/stamp-env
endif

# torch first, then constraints, so that no package replaces it; an environment that has a torch keeps it.
$(VENV)/stamp-env:
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PY) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("dcext: expected Python >= 3.10, found " + sys.version.split()[0])'
	@if [ '$(origin TORCH)' != file ] || ! $(PY) -c 'import torch' 2> /dev/null; then echo 'installing $(TORCH)'; $(PIP) $(TORCH); fi
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt $(BUILD_REQUIRES)
	@touch $@

$(VENV)/stamp-dev: pyproject.toml setup.py $(VENV)/stamp-env
	@echo "installing what building and testing needs, and building (the first time takes a few minutes)"
	@$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
