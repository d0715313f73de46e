# `make demo` and `make test` need nothing but Python 3.11; `make help` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TF_CPP_MIN_LOG_LEVEL ?= 2
export MPLBACKEND ?= agg

.PHONY: help demo demo-quick test lint trust coverage audit licences docs bench notebooks hooks lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## the main job, end to end, on synthetic data
	python -m rsnape_kit.cli demo

demo-quick: $(READY)  ## the same in some three minutes, with models that learn nothing
	python -m rsnape_kit.cli demo --size quick --folder demo-quick

test: $(READY) lint  ## exports, every notebook, every test
	nbdev_export
	python tests/run.py

lint: $(READY)  ## ruff everywhere, mypy on the packages that are typed
	ruff check .
	mypy

trust: $(READY)  ## all faults of inputs and machine, 40 kills, the whole chain of kernels, fresh environments; the tests run a part of them
	RSNAPE_TRUST=1 python tests/run.py tests/trust tests/kaggle/test_rehearse.py tests/test_install.py

COVERED ?=
coverage: export COVERAGE_ROOT = $(CURDIR)
coverage: export COVERAGE_FILE = $(CURDIR)/build/coverage/data
coverage: $(READY)  ## lines that tests and notebooks run together, into build/coverage; COVERED=tests/store for a part
	rm -rf build/coverage && mkdir -p build/coverage
	coverage run tests/run.py $(COVERED)
	coverage combine --quiet && coverage html --quiet && coverage report --skip-covered

AUDITED ?= requirements.txt
audit:  ## known vulnerabilities of the locked packages, into build/audit.md; needs the network, and says so without
	@rm -f build/audit.md; mkdir -p build
	@test -x $(VENV).audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV).audit && $(VENV).audit/bin/pip install -q pip-audit==2.10.0; } || rm -rf $(VENV).audit
	@$(VENV).audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off -r $(AUDITED) -f markdown -o build/audit.md; status=$$?; \
	  if [ $$status = 0 ] || [ -e build/audit.md ]; then cat build/audit.md; exit $$status; fi; \
	  echo "nothing was compared: pip-audit or its database could not be reached"

licences: $(READY)  ## the licences of all installed packages
	@python docs/hooks/licences.py

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)  ## the documentation site, into build/site, without a network
	mkdocs build --strict --quiet
	@echo "build/site/index.html; with search: python -m http.server -d build/site"

bench: $(READY)  ## side-by-side speed, as ratios
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; python $$script || exit 1; done

notebooks: $(READY)  ## run all notebooks, keep their outputs, clean what is not output
	nbdev_clean --clear_all
	for nb in nbs/[0-9]*.ipynb nbs/[0-9]*/*.ipynb nbs/tutorials/*.ipynb; do echo "$$nb"; \
	  (cd $$(dirname $$nb) && exec_nb $$(basename $$nb) --dest $$(basename $$nb) --exc_stop) || exit 1; done
	nbdev_export && nbdev_clean
	python -c "from rsnape_kit.kaggle.kernels import export_templates; export_templates()"

hooks: $(READY)  ## git hooks that clean notebooks on commit and merge them readably
	nbdev_install_hooks

lock: requirements.in  ## choose versions anew and write requirements.txt
	rm -rf $(VENV).lock && $(PYTHON) -m venv $(VENV).lock
	$(VENV).lock/bin/pip install -r requirements.in
	$(VENV).lock/bin/pip check
	{ echo "# Locked by 'make lock' from requirements.in, for Python 3.11"; \
	  $(VENV).lock/bin/pip freeze --all | grep -v '^pip==' | sed 's/+cpu$$//'; } > requirements.txt
	rm -rf $(VENV).lock

clean:  ## delete the environment, caches and the demo
	rm -rf $(VENV) $(VENV).lock $(VENV).audit demo demo-quick build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed for the locked requirements; set PYTHON=/path/to/python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	pip install -r requirements.txt
	pip install --no-deps --no-build-isolation -e .
	pip check
	touch $(READY)
