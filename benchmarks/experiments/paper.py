"""Figures from the papers that stand beside ours, and the sources of the settings here.

Only what was read in the source that is named. Not here, because no source could be read: the NLL, MiB and seconds of
each method in the tables of Matsubara et al., and the tables of Zhang and Zhao. The orders of the former's Table 1
are in `methods.py`.
"""

from __future__ import annotations

THEIRS = "paper, their GPU"

# Zhang, Zhao, "A Memory-Efficient Neural Ordinary Differential Equation Framework Based on High-Level Adjoint
# Differentiation", IEEE TAI 2022 (arXiv 2206.01298), abstract: image classification, PNODE's own discrete adjoint.
PNODE_SPEEDUP = {"vanilla neural ODE": 2.0, "best other reverse-accurate method": 2.3}

# Matsubara, Ishikawa, Yaguchi, "Deep Energy-Based Modeling of Discrete-Time Physics", NeurIPS 2020, as the README of
# its program (github.com/tksmatsubara/discrete-autograd) has it, "Results on the PDE datasets": mean squared error of
# the energy of HNN++, trained and rolled out with the adaptive Dormand-Prince method; mean of 15 trials, two TITAN V.
HNN_ENERGY_MSE = {"KdV": 3.01e-3, "Cahn-Hilliard": 4.89e-6}

# What is set here, and where that was read.
SOURCES = [
    (
        "costs and memory of the methods, in orders",
        "Matsubara et al. 2021, Table 1, as the README of their program repeats it (tksmatsubara/symplectic-adjoint-"
        "method)",
    ),
    (
        "tabular: layers, width, components M, activation, batch, learning rate, weight decay, dopri5, rtol 1e-6, "
        "atol 1e-8",
        "FFJORD's program for MINIBOONE and all tolerances (rtqichen/ffjord); for the others, programs that repeat "
        "FFJORD's experiments (lucaslie/torchprune; batches of POWER and HEPMASS: hanhsienhuang/CNF-TPR)",
    ),
    ("tabular data: columns, noise, splits", "FFJORD's program; GAS and BSDS300 as PNODE's copy of it has them"),
    (
        "images, `--full`: 3 convolutions of 64 channels, 2 components a scale, batch 200, tolerance 1e-5, Rademacher "
        "noise, margin of the logit",
        "FFJORD's program. It has as many components again after the squeeze of each scale but the last, 10 in all, "
        "where 6 are here; and it warms the learning rate up",
    ),
    (
        "physics: equations, grids, intervals, initial states, 90 and 10 trajectories; network, its initial values, "
        "batch 200, learning rate 1e-3, 10000 iterations with `--full`",
        "the program of the data's authors (tksmatsubara/discrete-autograd). It integrates the data by an "
        "energy-preserving scheme with the snapshots' interval as its step, where SciPy's Radau method is here",
    ),
    (
        "classification: euler, midpoint, bosh3, rk4, dopri5 with equal steps; batch 256 with `--full`",
        "PNODE's program (caidao22/pnode), whose “midpoint” is Heun's method in PETSc. Its network (SqueezeNext with 4 "
        "ODE blocks), data (CIFAR-10) and training (SGD, 200 epochs) are not repeated here",
    ),
    (
        "physics: dopri8, rtol 1e-6, atol 1e-8; the tolerances of the robustness experiment; that the paper keeps "
        "FFJORD's and the data's authors' settings, batches and M among them",
        "not confirmed: no source that gives them could be read",
    ),
]
