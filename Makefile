# Two commands do everything on a fresh machine: `make demo` and `make test`. A third one does on a machine with a GPU,
# whose Python has torch for it: `make gpu-check`, which installs nothing.
PYTHON ?= python3
VENV   := .venv
GPU_FOLDER ?= build/gpu-check
GPU_OPTIONS ?=
RUN    := $(VENV)/bin/python
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h) setup.py pyproject.toml

.PHONY: demo test lint build gpu-check clean

demo: build
	$(RUN) -m examples.demo

test: lint
	$(RUN) -m pytest -n 2 --dist loadfile --durations=15

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

# With the Python that is there: PYTHON=, its torch, transformers and pybind11. GPU_FOLDER needs some 45 GB on a drive.
# The eight minutes begin with the build.
gpu-check:
	started=$$(date +%s) && \
	ZINFER_REQUIRE_BUILD=1 timeout 120 $(PYTHON) setup.py --quiet build_ext --inplace && \
	$(PYTHON) -m benchmarks.gpu --folder "$(GPU_FOLDER)" --started $$started $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) build *.egg-info zinfer/*/*.so
