# Everything lives in .venv; constraints.txt locks every version.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test test-long lint bench clean
help:
	@echo "make demo       record, analyse and draw a trained checkpoint beside its closed form; see report/report.html"
	@echo "make test       the test suite"
	@echo "make test-long  the full grids"
	@echo "make lint       ruff and pyright"
	@echo "make bench      the scan's backends against each other on this machine"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mamba-probe report zoo:trained-mqar-mamba1 --task mqar -o report --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not gpu" -o timeout=3600

lint: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lint]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python benchmarks/scan.py

clean:
	rm -rf .venv report build dist *.egg-info
