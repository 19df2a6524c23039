# make demo: install what is needed, then fine-tune, evaluate and chat with the embedded model.
# make test: install the test dependencies and run the tests.
# make lint, make types, make format: ruff, the type checker, and ruff's formatter.
# make test-avx2: run the numerical tests again as an x86 processor without AVX-512 computes.
# They install into .venv unless PYTHON names the interpreter of an environment of your own:
#   make test PYTHON=python
VENV   := .venv
PYTHON ?= $(VENV)/bin/python

.PHONY: demo test test-avx2 lint types format clean
.DEFAULT_GOAL := demo

ifeq ($(PYTHON),$(VENV)/bin/python)
$(PYTHON):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	python3 -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
RUNTIME := $(VENV)/runtime.stamp
TESTING := $(VENV)/testing.stamp
$(RUNTIME): requirements.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@
$(TESTING): requirements-dev.txt requirements.txt requirements-extras.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
endif

demo: $(RUNTIME)
	OMP_NUM_THREADS=1 $(PYTHON) examples/demo.py

test: $(TESTING)
	$(PYTHON) tests/kernels.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check --quiet .

# ATen, oneDNN, MKL (which heeds it on Intel's processors only) and numpy's OpenBLAS.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=1
# A cache of compiled code of its own: what torch.compile cached for AVX-512 is taken up again by a
# process limited to AVX2, and computes NaN there.
test-avx2: $(TESTING)
	$(AVX2) $(PYTHON) tests/kernels.py avx2
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
		$(AVX2) TORCHINDUCTOR_CACHE_DIR="$$cache" $(PYTHON) -m pytest -q -n 2 -m numerical

lint: $(TESTING)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(TESTING)
	$(PYTHON) -m pyrefly check --python-interpreter-path $(PYTHON)

format: $(TESTING)
	$(PYTHON) -m ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
