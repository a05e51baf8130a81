# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h) setup.py pyproject.toml

.PHONY: demo test lint build clean

demo: build
	$(RUN) -m examples.demo

test: lint
	$(RUN) -m pytest

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

build: $(VENV)/.built

# A build that fails is an error here: the tests would be those of the portable code, and green.
$(VENV)/.built: export ZINFER_REQUIRE_BUILD = 1

# torch first, pinned: any other way of asking for it may pull gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	PYTHON="$(PYTHON)" scripts/system-packages
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r constraints.txt
	touch $@

$(VENV)/.built: $(VENV)/.torch $(NATIVE)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools>=77" "pybind11>=2.13"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info zinfer/*/*.so
