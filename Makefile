.DEFAULT_GOAL := help
.PHONY: demo page test quality fix-copies help
PYTHON ?= python3
BIN := .venv/bin
SCRIPTS := llava_*.py miniature benchmarks tests

demo: .venv/eval.done ## align the miniature model with ORPO and show on AMBER what it changed (two to five minutes, no GPU)
	$(BIN)/python benchmarks/bench_effect.py --seeds 0 --output_dir outputs/demo

page: .venv/host.done ## serve the miniature, before and after alignment, at http://127.0.0.1:7860
	$(BIN)/python llava_gradio_lora_host.py --test_mode

test: .venv/test.done .venv/browser.done ## everything that continuous integration runs
	$(BIN)/ruff format --check $(SCRIPTS)
	$(BIN)/ruff check $(SCRIPTS)
	$(BIN)/python tests/check_copies.py
	$(BIN)/python -m pytest

quality: .venv/test.done ## format, lint and check the copied blocks
	$(BIN)/ruff format $(SCRIPTS)
	$(BIN)/ruff check --fix $(SCRIPTS)
	$(BIN)/python tests/check_copies.py

fix-copies: ## overwrite copied blocks that drifted from their source
	$(PYTHON) tests/check_copies.py --fix

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: found Python %d.%d, need 3.11 or newer; set PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/train.done: requirements/train.txt | .venv/bin/python
	@echo "installing the packages of requirements/train.txt into .venv (about 2 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/train.txt
	@touch $@

.venv/eval.done: requirements/eval.txt .venv/train.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/eval.txt
	@touch $@

.venv/host.done: requirements/host.txt .venv/train.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/host.txt
	@touch $@

.venv/test.done: requirements/test.txt requirements/oracle.txt .venv/eval.done .venv/host.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/oracle.txt
	@touch $@

.venv/browser.done: .venv/test.done # for the tests of the page, which are skipped without one (not on CI, where they fail)
	@command -v chromium chromium-browser google-chrome >/dev/null || (apt-get -qq update && apt-get -qq install -y chromium) \
		|| $(BIN)/python -m playwright install chromium || echo "no Chromium: the tests of the page will be skipped"
	@touch $@
