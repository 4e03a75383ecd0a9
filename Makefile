# Every target sets itself up: a virtual environment in .venv, with the requirements.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint check clean

.venv/run.stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/run.stamp  ## train on digits, cut to half the work, fine-tune, measure, export, predict from the file
	$(BIN)/python train.py --data digits --epochs 25 --name demo --exist-ok
	$(BIN)/python prune.py --weights runs/train/demo/weights/best.pt --data digits --macs 0.5 --name demo --exist-ok
	$(BIN)/python train.py --weights runs/prune/demo/weights/pruned.pt --data digits --epochs 10 --name demo-pruned --exist-ok
	$(BIN)/python val.py --weights runs/train/demo-pruned/weights/best.pt --data digits --split test --name demo --exist-ok
	$(BIN)/python export.py --weights runs/train/demo-pruned/weights/best.pt --include torchscript --data digits --name demo --exist-ok
	$(BIN)/python predict.py --weights runs/export/demo/best.torchscript --source data/images --save-json --name demo --exist-ok
	@echo "training: runs/train/demo   cut: runs/prune/demo   fine-tuned: runs/train/demo-pruned   measures: runs/val/demo   shipped: runs/export/demo"

test: .venv/dev.stamp  ## the whole test suite
	$(BIN)/python -m pytest

lint: .venv/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## everything that a change must pass

clean:
	rm -rf .venv runs
