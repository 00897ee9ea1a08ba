# Two commands: `make demo` and `make test`. Each makes .venv and installs once; a second run installs nothing again.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
# Where pip looks for torch: empty takes pip's own index. The README names the one with the small CPU build.
TORCH_INDEX ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-long check torture fuzz install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    the whole loop on this machine: private data -> experts -> served mixtures (report in $(OUT)/)"
	@echo "make test    the test suite, without what takes minutes of several processes"
	@echo "make test-long   that: killed members and workers, benchmarks against real peers"
	@echo "make check   lint, types and all tests: what has to be green before a commit"
	@echo "make torture kills coordinators at random steps, many times, and reports (FEDERATIONS=10 for each scheduler);"
	@echo "             with MINUTES=5 it kills real processes instead"
	@echo "make fuzz    asks both doors of a service anything, CASES=10000 times, and tries as many hostile names"
	@echo "make clean   remove .venv and build output"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorafleet needs Python 3.11 or newer, found " + sys.version.split()[0] + "; pass PYTHON=/path/to/python3")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --index-url $(TORCH_INDEX) --no-deps torch)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/lorafleet demo --out $(OUT)

test: $(INSTALLED)
	VENV=$(VENV) scripts/check tests

test-long: $(INSTALLED)
	VENV=$(VENV) scripts/check long

check: $(INSTALLED)
	VENV=$(VENV) scripts/check

torture: $(INSTALLED)
	$(BIN)/python -m tests.coordinator.torture --federations $(or $(FEDERATIONS),10) $(if $(MINUTES),--minutes $(MINUTES))

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz.doors --cases $(or $(CASES),10000) $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m tests.fuzz.names --cases $(or $(CASES),10000) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) build *.egg-info $(OUT)
