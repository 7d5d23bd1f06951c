# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up their own .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONWARNINGS := ignore

.PHONY: help install demo demo-sft demo-compress demo-puzzle demo-hybrid demo-vlm test faults chaos test-hf test-gguf test-eval test-other-readers bench card docs lint clean

help: ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: $(STAMP) ## create .venv with the tested versions

# The environment is rebuilt when the pins change, and only then.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned versions into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## fetch real text, pretrain nemotron_h_tiny on the CPU, print a continuation, draw its report
	@$(BIN)/nemotron-h doctor
	@$(BIN)/nemotron-h data prepare --blend sample_small
	@$(BIN)/nemo llm pretrain --factory nemotron_h_tiny --yes
	@$(BIN)/nemotron-h generate runs/nemotron_h_tiny "The capital of" --max-tokens 60
	@echo "report: runs/nemotron_h_tiny/report.html, its loss by phase alone: runs/nemotron_h_tiny/loss.svg"

# Two ranks of one thread each: on two cores they are faster than one rank of two threads (docs/results/cpu.md).
demo-compress: export CUDA_VISIBLE_DEVICES :=
demo-compress: $(STAMP) ## pretrain a parent on two cores, compress it to two thirds (MiniPuzzle), write a report
	@$(BIN)/nemotron-h data prepare --blend sample_small
	@$(BIN)/nemo llm pretrain --factory nemotron_h_tiny --yes parallel.devices=2 data.micro_batch_size=8 tokens=1966080 log.validate_every_steps=80 name=nemotron_h_tiny_parent
	@$(BIN)/nemotron-h minipuzzle nemotron_h_tiny parallel.devices=2 data.micro_batch_size=8 minipuzzle.parent=runs/nemotron_h_tiny_parent
	@echo "report: runs/nemotron_h_tiny_minipuzzle/export/report.html"

demo-puzzle: export CUDA_VISIBLE_DEVICES :=
demo-puzzle: $(STAMP) ## pretrain a parent of many heads on two cores, compress it layer by layer (Puzzle), write a report
	@$(BIN)/nemotron-h data prepare --blend sample_small
	@$(BIN)/nemo llm pretrain --factory nemotron_h_tiny_heads --yes parallel.devices=2 data.micro_batch_size=8
	@$(BIN)/nemotron-h puzzle nemotron_h_tiny_heads parallel.devices=2 data.micro_batch_size=8
	@echo "report: runs/nemotron_h_tiny_heads_puzzle/report/report.html"

demo-hybrid: export CUDA_VISIBLE_DEVICES :=
demo-hybrid: $(STAMP) ## train a small Transformer on checkable problems on two cores, make hybrids of it, compare them in equal time
	@$(BIN)/nemotron-h data problems --tasks lists --difficulty 1-2 --count 48000 --out runs/problems
	@$(BIN)/nemotron-h data prepare --blend runs/problems/problems.yaml
	@$(BIN)/nemo llm pretrain --factory "nemotron_h_recipe(path=demos/problems_parent.yaml)" --yes parallel.devices=2
	@$(BIN)/nemotron-h hybridise demos/problems_hybrid.yaml parallel.devices=2
	@OMP_NUM_THREADS=1 $(BIN)/nemotron-h coverage runs/problems_parent $(foreach n,1 2 3,runs/problems_hybrid/distil-$n/problems_hybrid_$n) \
		--tasks runs/problems/test.jsonl --count 100 --samples 32 --seconds 0.02,0.04,0.08,0.16,0.32 --max-tokens 160 --out runs/problems_coverage
	@echo "reports: runs/problems_hybrid/report/report.html, runs/problems_coverage/report.html"

demo-vlm: export CUDA_VISIBLE_DEVICES :=
demo-vlm: $(STAMP) ## on two cores teach the model of `make demo` to read pictures, ask it about held-out digits and words
	@test -d runs/nemotron_h_tiny || { echo "run make demo first: runs/nemotron_h_tiny is what learns to see"; exit 2; }
	@$(BIN)/nemotron-h data pictures --kinds digits,signs --count 40000 --test-count 300 --size 32 --out runs/pictures
	@$(BIN)/nemotron-h data prepare --blend runs/pictures/pictures.yaml
	@test -d runs/vlm_encoder || $(BIN)/python demos/vlm_encoder.py runs/pictures/train/digits.jsonl runs/pictures/train/signs.jsonl --out runs/vlm_encoder
	@test -d runs/vlm_start || $(BIN)/nemotron-h import vision runs/nemotron_h_tiny runs/vlm_encoder runs/vlm_start
	@$(BIN)/nemo llm finetune --factory "nemotron_h_recipe(path=demos/vlm_projector.yaml)" --yes
	@$(BIN)/nemo llm finetune --factory "nemotron_h_recipe(path=demos/vlm.yaml)" --yes
	@for run in vlm_projector vlm; do $(BIN)/nemotron-h eval runs/$$run --blend sample_small --tokens 8192; done # of text, before stage 2 and after
	@$(BIN)/nemotron-h vqa runs/vlm_projector runs/vlm --test runs/pictures/test/digits.jsonl --test runs/pictures/test/digits_others.jsonl \
		--test runs/pictures/test/signs.jsonl --test runs/pictures/test/signs_fonts.jsonl --max-tokens 8 --out runs/vlm_answers
	@echo "pictures, questions and answers: runs/vlm_answers/report.html"

demo-sft: $(STAMP) ## fine-tune the model of `make demo` on real instructions, talk with it before and after, check its export
	@$(BIN)/python demos/sft.py

test: $(STAMP) ## run the test suite
	@$(BIN)/ruff check .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile # two at a time, a core each

faults: $(STAMP) ## kill, stop and damage small runs at random moments and compare: make faults N=200 JOBS=2 (docs/faults.md)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py --cases $(or $(N),200) --jobs $(or $(JOBS),1) $(if $(REAL),--outside)

chaos: $(STAMP) ## ckpt-chaos kills a small run at each file that it writes and judges the resume: make chaos N=40 FORKS=1
	@$(BIN)/python tests/faults/chaos.py --points $(or $(N),40) $(if $(FORKS),--forks)

test-hf: $(STAMP) ## exported models in Hugging Face transformers, in an environment of their own (set up first)
	@python=$$($(BIN)/python -m nemotron_h.platform.environments .bench/hf tests/benchmarks/requirements_hf.txt) && \
		NEMOTRON_H_HF_PYTHON=$$python $(BIN)/python -m pytest tests/export

test-gguf: $(STAMP) ## exported models in llama.cpp, in an environment of its own (set up first)
	@python=$$($(BIN)/python -m nemotron_h.platform.environments .bench/gguf tests/export/requirements_gguf.txt) && \
		NEMOTRON_H_GGUF_PYTHON=$$python $(BIN)/python -m pytest tests/export/test_gguf.py tests/export/test_llama_cpp.py

test-eval: $(STAMP) ## tasks of lm-evaluation-harness, in an environment of its own (set up first, 2 GB)
	@python=$$($(BIN)/python -m nemotron_h.platform.environments .bench/lm_eval collections/nemotron_h/evaluation/requirements.txt) && \
		NEMOTRON_H_LM_EVAL_PYTHON=$$python $(BIN)/python -m pytest tests/evaluation

test-other-readers: $(STAMP) ## exported models in mlx-lm and vLLM, in environments of their own (set up first, 4 GB)
	@$(BIN)/python -m nemotron_h.platform.environments .bench/mlx tests/export/requirements_mlx.txt
	@$(BIN)/python -m nemotron_h.platform.environments .bench/vllm tests/export/requirements_vllm.txt
	@.bench/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # built for another torch
	@$(BIN)/python -m pytest tests/export/test_other_readers.py

bench: $(STAMP) ## a training step and generation against Hugging Face transformers; preparation and sampling against datasets and megatron-core; distillation against full logits
	@$(BIN)/python tests/benchmarks/bench_train.py
	@$(BIN)/python tests/benchmarks/bench_generation.py
	@$(BIN)/python tests/benchmarks/bench_data.py
	@$(BIN)/python tests/benchmarks/bench_distill.py

card: $(STAMP) ## run a verification card of docs/cards again and say what differs: make card CARD=docs/cards/NAME.yaml
	@test -n "$(CARD)" || { echo "which card? make card CARD=docs/cards/nemotron_h_tiny-cpu.yaml"; ls docs/cards/*.yaml; exit 2; }
	@$(BIN)/python demos/card.py "$(CARD)"

docs: $(STAMP) ## build the documents as a site in site/, strictly: a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html; with its search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

lint: $(STAMP) ## ruff
	@$(BIN)/ruff check .

clean: ## remove environments; data and runs stay
	rm -rf $(VENV) .bench site
