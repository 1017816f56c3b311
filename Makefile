PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test lint

demo: .venv/product
	$(RUN) demo.py

test: .venv/tools
	$(RUN) -m pytest

lint: .venv/tools
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/product: requirements.txt
	@echo "Installing into .venv: up to 6 GB, some minutes"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/tools: .venv/product requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@
