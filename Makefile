# make demo     set up, then edit a clip with the small model and say where the result is
# make app      set up, then serve a page to edit clips on, to this machine only
# make test     set up, then run the tests on all cores
# make faults   set up, then the long forms: kills, damage, full disks, signals; an hour or more
# make lint     set up, then check the style and the layers of imports
# make setup    only the environment, .venv
# make clean    remove what the demo made and nothing else; .venv stays

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
APP_READY := $(VENV)/.ready-app

.PHONY: setup demo app test faults lint clean

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile -r requirements.txt -r requirements-dev.txt
	touch $@

$(APP_READY): $(READY) requirements-app.txt
	$(PY) -m pip install --quiet --no-compile -r requirements-app.txt
	touch $@

demo: $(READY)
	$(PY) -m scripts.demo

app: $(APP_READY)
	$(PY) app.py

test: $(APP_READY)
	$(PY) -m pytest -n auto --dist worksteal -m "not slow and not browser"
	$(PY) -m pytest -m "browser and not slow"

faults: $(READY)
	$(PY) -m pytest -m slow -s tests

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

clean:
	rm -rf latents/demo tokenflow-results/demo tokenflow-results/demo.png
