"""Which classification networks can be cut: each is cut to about 60 % of its multiply-adds.

python -m benchmarks.coverage --out FILE
python -m benchmarks.coverage --library timm --with-peer --out FILE      # pip install timm torch-pruning

A network passes if its narrow form equals the masked one in eval mode, is the same after saving and loading, and takes a
training step. Weights are random, and so are norms and scales, lest a zero or a one hide a mistake. Groups that can't be cut
are listed with the reason. Each network runs in a process of its own. Of torchvision all are tried, of timm one of each family
(timm_families.txt). With --with-peer Torch-Pruning cuts the same network too: it passes if it returns a network that runs and has
fewer multiply-adds. Whether that equals the masked network it does not check, and neither do we.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.pruning.allocation import Budget, allocate
from compression.pruning.narrowing import spec_of
from compression.pruning.plan import entries_of, make_plan
from compression.pruning.surgery import shrink_
from compression.scoring.criteria import score
from compression.tracing.channels import trace
from compression.tracing.costs import macs_cost
from compression.tracing.cutting import relative_difference
from compression.tracing.graph import ChannelGraph
from compression.tracing.record import OUTPUT
from models.networks import build
from models.networks.external import TIMM_PREFIX, torchvision_names
from models.networks.widths import group_counts, resize_
from utils.errors import UserError
from utils.measures.profile import count_macs
from utils.spec import ModelSpec

SHARE = 0.6
IMGSZ = 96  # rules and proofs do not depend on it; the following networks take no other size than their own
OWN_SIZE = ("vit_", "maxvit_")
PEER_LEAVES = 0.98  # of the multiply-adds: where more are left, nothing was cut


def draw_(model: nn.Module) -> None:
    """Draw statistics, norms and small scales at random, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 or name == "layer_scale":
                parameter.data.normal_(0.8 if name != "bias" else 0, 0.2)
            elif not parameter.any():  # some heads start as zeros
                parameter.data.normal_(0, 0.05)


def examine(name: str) -> dict[str, Any]:
    """Cut one network and return its row."""
    torch.manual_seed(0)
    spec = ModelSpec(name, 10, size_of(name), plain_weights=True)
    model = build(spec).eval()
    draw_(model)
    inputs = torch.randn(2, 3, *spec.size)
    start = time.perf_counter()
    graph = trace(model, inputs[:1])
    seconds = time.perf_counter() - start
    total = count_macs(model, spec)
    cost = macs_cost(graph, total)
    entries = entries_of(graph, name)
    least = cost(cost.vector({group.name: max(len(group.fixed), 1) for entry in entries for group in entry})) / total
    if not entries or least > 0.95:
        raise SystemExit(f"nothing in this network can be cut: {reasons(graph)}")
    share = max(SHARE, least + 0.05)
    widths = allocate(graph, entries, Budget(cost, share, "macs"), 1, 1, None)
    orders = {key: value.order.tolist() for key, value in score("random", model, graph, None, 0).groups.items()}
    plan = make_plan(graph, widths, orders)
    narrow = deepcopy(model)
    difference = shrink_(narrow, graph, plan.kept, inputs)
    after = spec_of(spec, group_counts(model), narrow)
    return {
        "model": name,
        "passes": reloads(narrow, after, inputs) and trains(narrow, inputs),
        "macs": count_macs(narrow, after) / total,
        "least": round(least, 4),
        "difference": difference,
        "cut": f"{len(graph.prunable)} of {len(graph.groups) - 1} groups",
        "trace_s": round(seconds, 2),
        "stays": reasons(graph),
    }


def size_of(name: str) -> int:
    """Return the side of a network's images: ``IMGSZ``, unless it takes its own only."""
    if not name.startswith(TIMM_PREFIX):
        return 224 if name.startswith(OWN_SIZE) else IMGSZ
    import timm

    try:
        spec = ModelSpec(name, 10, IMGSZ)
        count_macs(build(spec), spec)
        return IMGSZ
    except UserError:
        return int(timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).input_size[-1])


def cut_by_peer(name: str) -> str:
    """Return what Torch-Pruning makes of a network when it takes a quarter of the channels and heads."""
    import torch_pruning

    torch.manual_seed(0)
    spec = ModelSpec(name, 10, size_of(name))
    model = build(spec).eval()
    total, inputs = count_macs(model, spec), torch.randn(1, 3, *spec.size)
    modules: list[Any] = list(model.modules())
    heads: list[nn.Module] = [module for module in modules if isinstance(module, nn.Linear) and module.out_features == spec.num_classes]
    counts: dict[nn.Module, int] = {
        module.qkv: module.num_heads for module in modules if hasattr(module, "qkv") and hasattr(module, "num_heads")
    }
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.25,
            ignored_layers=heads,
            num_heads=counts,
            prune_head_dims=False,
            prune_num_heads=True,
            head_pruning_ratio=0.25,
        )
        pruner.step()
        for module in modules:
            if getattr(module, "qkv", None) in pruner.num_heads:
                module.num_heads = pruner.num_heads[module.qkv]
        model(inputs)
        left = count_macs(model, spec) / total
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return f"{left:.1%}" if left < PEER_LEAVES else "nothing cut"


def reloads(narrow: nn.Module, spec: ModelSpec, inputs: torch.Tensor) -> bool:
    """Whether a network gives the same logits after it was saved and loaded."""
    buffer = io.BytesIO()
    torch.save({"spec": spec.to_dict(), "state": narrow.state_dict()}, buffer)
    buffer.seek(0)
    content = torch.load(buffer, weights_only=True)
    again = build(ModelSpec.from_dict(content["spec"])).eval()
    resize_(again, content["state"], spec.groups)
    again.load_state_dict(content["state"])
    with torch.no_grad():
        return relative_difference(again(inputs), narrow(inputs)) < 1e-5


def trains(narrow: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether the loss and every gradient of a training step are finite."""
    narrow.train()
    optimizer = torch.optim.SGD(narrow.parameters(), lr=1e-4)
    loss = nn.functional.cross_entropy(narrow(inputs), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    return bool(loss.isfinite()) and all(p.grad is None or bool(p.grad.isfinite().all()) for p in narrow.parameters())


def reasons(graph: ChannelGraph) -> str:
    """Return why groups and layers are not cut, each reason once, without the names of modules and without the network's output."""
    of_groups = [group.reason for group in graph.groups if group.reason and group.reason != OUTPUT]
    given = [*of_groups, *graph.record.unfollowed.values()]
    found = Counter(" ".join("..." if "." in word else word for word in reason.split()) for reason in given)
    return "; ".join(f"{count}x {reason}" for reason, count in found.items())


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--library", default="torchvision", choices=["torchvision", "timm"])
    parser.add_argument("--with-peer", action="store_true", help="have Torch-Pruning cut each network too")
    parser.add_argument("--models", nargs="*", default=[], help="only these")
    parser.add_argument("--one", default="", help="examine one network and print its row as JSON")
    parser.add_argument("--peer", default="", help="have Torch-Pruning cut one network and print what becomes of it")
    parser.add_argument("--seconds", type=int, default=600, help="limit for one network")
    options = parse_options(parser)
    if options.one:
        print(json.dumps(examine(options.one)))
        return
    if options.peer:
        print(json.dumps(cut_by_peer(options.peer)))
        return
    timm = options.library == "timm"
    families = (Path(__file__).parent / "timm_families.txt").read_text(encoding="utf-8").split()
    rows = []
    for name in options.models or ([TIMM_PREFIX + family for family in families] if timm else torchvision_names()):
        found, why = in_a_process("--one", name, options)
        failed = {"model": name, "passes": False, "macs": 1.0, "least": 1.0, "difference": 0.0, "cut": "", "trace_s": 0.0, "stays": why}
        rows.append(found or failed)
        if options.with_peer:
            peer, why = in_a_process("--peer", name, options)
            rows[-1]["peer"] = why if peer is None else peer
        print(rows[-1], flush=True)
        report("coverage", rows, options.out)


def in_a_process(flag: str, name: str, options: argparse.Namespace) -> tuple[Any, str]:
    """Return what this script prints for one network, or None and why it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", flag, name, "--threads", str(options.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"took more than {options.seconds} s"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None, (done.stderr.splitlines() or ["it was killed"])[-1]
    return json.loads(lines[-1]), ""


if __name__ == "__main__":
    main()
