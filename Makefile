# Two commands: `make demo` runs the whole job, `make test` runs lint, types and tests. Both make .venv on first use.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Much of the tests is waiting; files go to processes as a whole, since their tests share what is costly to make.
WORKERS ?= 2
BIN := $(VENV)/bin
APT := $(if $(filter 0,$(shell id -u)),,sudo )env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0

.PHONY: demo test setup clean

demo: setup
	$(BIN)/f2v demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

setup: $(VENV)/ready

# Packages from the index are pinned; apt is asked only for what a bare machine turns out to lack.
$(VENV)/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "make: Python 3.11 to 3.13 is needed; name one with make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { $(APT) update && $(APT) install -y python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q --no-deps -r requirements.lock
	$(BIN)/pip install -q --no-deps -e .
	@$(BIN)/python -c 'import cv2' 2>/dev/null \
		|| { $(APT) update && $(APT) install -y libgl1 libglib2.0-0; }
	@$(BIN)/python -c 'import cv2, dlib, onnxruntime, ray, torch'
	touch $@

clean:
	rm -rf $(VENV)
