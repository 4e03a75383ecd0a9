# Every target sets itself up: a virtual environment in .venv, with the requirements.
PYTHON ?= python3
BIN := .venv/bin
EXPORT_BIN := .venv-export/bin

.PHONY: demo test test-export test-exhaustive test-processors lint check clean

.venv/run.stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# OpenVINO and NNCF have an environment of their own: their threads do not always survive the forks of other tests.
.venv-export/stamp: requirements-dev.txt requirements-export.txt requirements.txt
	test -x $(EXPORT_BIN)/python || $(PYTHON) -m venv .venv-export
	$(EXPORT_BIN)/python -m pip install --quiet -r requirements-dev.txt -r requirements-export.txt
	touch $@

demo: .venv/run.stamp  ## train on digits, cut to half the work, fine-tune, measure, export, predict from the file
	$(BIN)/python train.py --data digits --epochs 25 --name demo --exist-ok
	$(BIN)/python prune.py --weights runs/train/demo/weights/best.pt --data digits --macs 0.5 --name demo --exist-ok
	$(BIN)/python train.py --weights runs/prune/demo/weights/pruned.pt --data digits --epochs 10 --name demo-pruned --exist-ok
	$(BIN)/python val.py --weights runs/train/demo-pruned/weights/best.pt --data digits --split test --name demo --exist-ok
	$(BIN)/python export.py --weights runs/train/demo-pruned/weights/best.pt --include torchscript --data digits --name demo --exist-ok
	$(BIN)/python predict.py --weights runs/export/demo/best.torchscript --source data/images --save-json --name demo --exist-ok
	@echo "training: runs/train/demo   cut: runs/prune/demo   fine-tuned: runs/train/demo-pruned   measures: runs/val/demo   shipped: runs/export/demo"

test: .venv/dev.stamp  ## the test suite; at its end it says what it left out
	$(BIN)/python -m pytest

test-export: .venv-export/stamp  ## the tests of exported files with OpenVINO and NNCF too, which this installs
	$(EXPORT_BIN)/python -m pytest -rs tests/compression/exporting tests/compression/latency tests/models/test_backends.py

test-exhaustive: .venv/dev.stamp  ## what takes too long for every run
	$(BIN)/python -m pytest -m exhaustive

# Results must not depend on the processor: on its vector instructions, on the order in which threads add. Four runs of the suite:
#   1. PyTorch without vector instructions, oneDNN with SSE4.1, MKL with the same sums on any processor; 1 thread
#   2. PyTorch, oneDNN and MKL with AVX2; 2 threads
#   3. this processor's own instructions; 4 threads
#   4. PyTorch without vector instructions, oneDNN with AVX2; 4 threads
# Each runs to its end; the last lines say how each of them ended.
PROCESSORS := \
  "OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE" \
  "OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2" \
  "OMP_NUM_THREADS=4" \
  "OMP_NUM_THREADS=4 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2"

test-processors: .venv/dev.stamp  ## the test suite as other processors would run it
	@failed=0; report=; for processor in $(PROCESSORS); do \
	  echo "== $$processor"; \
	  if env $$processor $(BIN)/python -m pytest; then result=passed; else result=FAILED; failed=1; fi; \
	  report="$$report$$result: $$processor\n"; \
	done; printf "$$report"; exit $$failed

lint: .venv/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## everything that a change must pass

clean:
	rm -rf .venv .venv-export runs
