# Everything lives in .venv; constraints.txt locks every version, constraints-oldest.txt those of the oldest transformers,
# constraints-peers.txt those of nnsight and TransformerLens.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
OLDEST := .venv/oldest
PEERS := .venv/peers

.PHONY: help demo docs test test-long test-oldest test-peers browser lint bench clean
help:
	@echo "make demo       record, analyse and draw a trained checkpoint beside its closed form; see report/report.html"
	@echo "make docs       the site, in docs/_build/html/index.html; a picture is drawn anew where its script changed, all after make clean"
	@echo "make test       the test suite"
	@echo "make test-long  the full grids, those of mixers and formats on the oldest transformers, test-peers, a browser"
	@echo "make test-peers beside nnsight and TransformerLens (240 MB more)"
	@echo "make browser    Debian's Chromium and Selenium, for test-long: a report full of hostile text (as root)"
	@echo "make lint       ruff and pyright"
	@echo "make bench      the scan's backends against each other on this machine"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

$(OLDEST)/.installed: constraints-oldest.txt $(INSTALLED)
	rm -rf $(OLDEST)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) -r constraints-oldest.txt
	@touch $@

$(PEERS)/.installed: constraints-peers.txt $(INSTALLED)
	rm -rf $(PEERS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS) -r constraints-peers.txt
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mamba-probe report zoo:trained-mqar-mamba1 --task mqar -o report --overwrite

docs: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet -c docs . docs/_build/html

# Tests of one module stay with one process, which makes its fixtures once; the modules that the tests' many processes
# import are compiled once, whatever the environment says.
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

test-long: $(INSTALLED) test-oldest test-peers
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[notebook]"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" -o timeout=3600

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 -m "not gpu" -o timeout=3600 tests/mixers tests/formats tests/probe

test-peers: $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest tests/peers

browser: $(INSTALLED)
	apt-get update --quiet
	apt-get install --quiet --yes --no-install-recommends chromium chromium-driver
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"

lint: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lint]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python benchmarks/scan.py

clean:
	rm -rf .venv report build dist *.egg-info docs/_build docs/gallery
