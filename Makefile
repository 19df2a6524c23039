# make demo: install what is needed, then fine-tune, evaluate and chat with the embedded model.
# make test: install the test dependencies and run the tests.
# Both install into .venv unless PYTHON names the interpreter of an environment of your own:
#   make test PYTHON=python
VENV   := .venv
PYTHON ?= $(VENV)/bin/python

.PHONY: demo test clean
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
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2
	$(PYTHON) -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
