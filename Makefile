# On a bare machine with Python >= 3.11 and make: `make demo`, `make test`. Everything is installed into .venv, pinned.
#
#   PYTHON=python3.12   the Python to make .venv with; without it the first on PATH that is new enough
#   ARGS="-k stacked"   passed on to the demo or to pytest
#   N=200               faults of `make chaos`

VENV := .venv
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)

# a stamp is named after what it installed: a changed pin installs again, a touched file or another branch does not
KEY := $(shell cat pyproject.toml constraints.txt requirements-reference.txt | cksum | tr ' ' -)
MADE := $(VENV)/.made
INSTALLED := $(VENV)/.installed-$(KEY)
INSTALLED_DEV := $(VENV)/.installed-dev-$(KEY)
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-heavy test-gpu chaos lint install install-dev clean
.SILENT:

demo: $(INSTALLED)
	$(VENV)/bin/python tune_ci_vit.py $(ARGS)

test: $(INSTALLED_DEV)
	$(VENV)/bin/python -m pytest $(ARGS)

test-heavy: $(INSTALLED_DEV)
	$(VENV)/bin/python -m pytest -m heavy $(ARGS)

test-gpu: $(INSTALLED_DEV)
	$(VENV)/bin/python -m pytest -m gpu $(ARGS)

chaos: $(INSTALLED_DEV)
	$(VENV)/bin/python -m tests.chaos --faults $(or $(N),200) $(ARGS)

lint: $(INSTALLED_DEV)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

$(MADE):
	if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		echo "lanewise needs Python 3.11 or newer; $${PYTHON:-python3} is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by its own version, so that nothing that depends on it can choose another build
$(INSTALLED): | $(MADE)
	echo "installing into $(VENV), pinned (minutes the first time)"
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e .
	touch $@

$(INSTALLED_DEV): | $(INSTALLED)
	echo "installing what the tests need"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps -r requirements-reference.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './sweeps/*' -prune -exec rm -rf {} +
