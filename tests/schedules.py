"""What tests put schedules together from."""

from __future__ import annotations

THINNING = {"thinning": {"class": "FilterRemover"}}


def filters(weights, sparsity=0.5, begin=None):
    """Describe a pruner of the filters with the smallest L1 norms: at once or, from a sparsity on, more in each epoch."""
    if begin is None:
        return {"class": "L1RankedStructureParameterPruner", "group_type": "Filters", "desired_sparsity": sparsity, "weights": weights}
    target = {"initial_sparsity": begin, "final_sparsity": sparsity}
    return {"class": "L1RankedStructureParameterPruner_AGP", "group_type": "Filters", **target, "weights": weights}


def elements(weights, begin, sparsity):
    """Describe a pruner of the smallest weights, more of them in each epoch."""
    return {"class": "AutomatedGradualPruner", "initial_sparsity": begin, "final_sparsity": sparsity, "weights": weights}


def policy(kind, name, first, end=None, **more):
    """Describe a policy from an epoch on, up to the epoch before ``end`` or to the end of the run."""
    return {kind: {"instance_name": name}, "starting_epoch": first, **({} if end is None else {"ending_epoch": end}), **more}


def once(kind, name, epoch):
    """Describe a policy of one epoch."""
    return {kind: {"instance_name": name}, "epochs": [epoch]}
