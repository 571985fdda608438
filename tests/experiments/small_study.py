"""A small results file of the study, made up, for the tests of its tables and figures."""

from typing import Any

import numpy as np

from experiments.paper.scores import pack

COUNT = 100
RIGHT = np.arange(COUNT) < 80  # the images that the float network gets right


def scored(right, top1=True):
    """What `paper_scores.summary` writes of a network that gets these right; its intervals are made up."""
    agrees = right == RIGHT
    found = {
        "top1": None, "top5": None, "agreement": float(agrees.mean()), "agreement_interval": [0.9, 1.0],
        "agrees": pack(agrees), "output_sqnr_db": 20.0,
    }  # fmt: skip
    if not top1:
        return found
    return found | {
        "top1": float(right.mean()), "top1_interval": [0.7, 0.9], "top5": 1.0, "kl": 0.01,
        "loss": float(RIGHT.mean() - right.mean()), "loss_interval": [0.0, 0.02], "right": pack(right),
    }  # fmt: skip


def cell(method, bits, size, lost, top1=True, **fields):
    """A cell that gets the first `lost` images wrong."""
    setting = {
        "method": method, "bits": bits, "granularity": "tensor", "scale": "none", "codebook_format": "float32",
        "rules": [], "word": None,
    }  # fmt: skip
    right = RIGHT & (np.arange(COUNT) >= lost)
    return {
        "cell": setting | fields,
        "stored_bytes": size,
        "bytes": size,
        "bits_per_weight": 4.0,
        "sqnr_db": 20.0,
        "layers": {"Conv_10/kernel": 6.0 * bits, "Conv_9/kernel": 5.0 * bits},
        **scored(right, top1),
    }


def results(top1=True):
    """Of a network that gets 80 of 100 images right."""
    return {
        "network": "network",
        "title": "Network",
        "images": COUNT,
        "commands": ["python -m experiments.paper.study --network network"],
        "versions": {"jax": "1.0"},
        "platform": {"cores": 2, "machine": "x"},
        "float": {"bytes": 8000, **scored(RIGHT, top1)},
        "cells": [
            cell("knq", 3, 900, 4, top1),
            cell("knq", 4, 1100, 1, top1),
            cell("knq", 4, 1100, 2, top1, word=8) if top1 else cell("knq", 8, 1900, 0, top1),
            cell("enq", 4, 1100, 9, top1),
            cell("enq", 5, 1400, 1, top1),
            cell("uniform", 4, 1000, 9, top1),
            cell("uniform", 5, 2200, 1, top1),
            cell("dfp", 4, 1000, 30, top1),
        ],
    }


def results_with_data():
    """Of the same network, as `experiments.paper.calibrated` writes them."""
    learned: dict[str, Any] = {"scale": "channel", "codebook_format": "float16"}
    return results() | {
        "learned": 50,
        "commands": ["python -m experiments.paper.calibrated --network network"],
        "cells": [
            cell("knq", 4, 1300, 1, budget=None),
            cell("uniform", 5, 1900, 2, budget=None, granularity="channel"),
            cell("dfp", 5, 1800, 1, budget=None, granularity="channel"),
            cell("dfp", 6, 2200, 0, budget=None, granularity="channel"),
            cell("knq, data", 8, 900, 1, budget="3.5bpw", **learned),
            cell("knq, data", 8, 1210, 0, budget="4.5bpw", **learned),
            cell("enq, data", 8, 1000, 1, budget="4bpw", **learned),
            cell("uniform, data", 4, 1000, 1, budget=None, **learned),
        ],
    }
