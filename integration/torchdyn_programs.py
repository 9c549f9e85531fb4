"""Three programs that know torchdyn and nothing else: a classifier, a normalizing flow, a ball that bounces.

    python -m integration.torchdyn_programs --sensitivity symplectic_adjoint

Each is a function of one string: the sensitivity of its NeuralODE or, for the ball, the name of its solver. The data
are real: the wines and the breast cancer diagnoses that scikit-learn comes with.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import attr
import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import Augmenter
from torchdyn.numerics.odeint import odeint_hybrid
from torchdyn.numerics.utils import EventCallback

TOLERANCE = 1e-3


def standardized(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / features.std(0)


class Classifier(lightning.LightningModule):
    """Tells benign from malignant tumours by 30 measurements: a NeuralODE between two linear layers."""

    FEATURES, CLASSES, STATE, HIDDEN = 30, 2, 8, 32

    def __init__(self, sensitivity: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        field = nn.Sequential(nn.Linear(self.STATE, self.HIDDEN), nn.Tanh(), nn.Linear(self.HIDDEN, self.STATE))
        self.model = nn.Sequential(
            nn.Linear(self.FEATURES, self.STATE - 2),
            Augmenter(augment_idx=1, augment_dims=2),
            NeuralODE(
                field, solver="dopri5", sensitivity=sensitivity, atol=TOLERANCE, rtol=TOLERANCE, return_t_eval=False
            ),
        )
        self.head = nn.Linear(self.STATE, self.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x)[-1])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        features, labels = batch
        return nn.functional.cross_entropy(self(features), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def tumours() -> tuple[TensorDataset, TensorDataset]:
    """For training, and held out: every fourth."""
    data = load_breast_cancer()
    features, labels = standardized(torch.tensor(data.data, dtype=torch.float32)), torch.tensor(data.target)
    held_out = torch.arange(len(labels)) % 4 == 0
    return TensorDataset(features[~held_out], labels[~held_out]), TensorDataset(features[held_out], labels[held_out])


@dataclass
class Trained:
    """A classifier's share of right answers on held-out data, and its parameters."""

    accuracy: float
    resumed_accuracy: float
    parameters: Tensor


def classify(sensitivity: str, epochs: int = 4, folder: str | None = None) -> Trained:
    """Train the classifier, with a checkpoint half-way; resume from that and train the second half once more."""
    if folder is None:
        with TemporaryDirectory() as temporary:
            return classify(sensitivity, epochs, temporary)
    training, held_out = tumours()
    checkpoint = str(Path(folder) / "half-way.ckpt")

    def fit(model: Classifier, until: int, resume: str | None = None) -> lightning.Trainer:
        trainer = lightning.Trainer(
            max_epochs=until, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        batches = DataLoader(training, batch_size=64, shuffle=False)
        trainer.fit(model, batches, ckpt_path=resume, weights_only=False)
        return trainer

    def accuracy(model: Classifier) -> float:
        features, labels = held_out.tensors
        with torch.no_grad():
            return float((model(features).argmax(1) == labels).float().mean())

    torch.manual_seed(0)
    model = Classifier(sensitivity)
    fit(model, epochs // 2).save_checkpoint(checkpoint)
    fit(model, epochs, checkpoint)
    resumed = Classifier.load_from_checkpoint(checkpoint, weights_only=False)
    fit(resumed, epochs, checkpoint)
    return Trained(accuracy(model), accuracy(resumed), nn.utils.parameters_to_vector(model.parameters()).detach())


def flow(sensitivity: str, steps: int = 20) -> list[float]:
    """Fit a continuous normalizing flow to the 13 measurements of 178 wines; returns the loss, nats a measurement."""
    torch.manual_seed(0)
    wines = standardized(torch.tensor(load_wine().data, dtype=torch.float32))
    size = wines.shape[1]
    prior = torch.distributions.MultivariateNormal(torch.zeros(size), torch.eye(size))
    net = nn.Sequential(nn.Linear(size, 32), nn.Softplus(), nn.Linear(32, size))
    model = nn.Sequential(
        Augmenter(augment_idx=1, augment_dims=1),
        NeuralODE(
            CNF(net, trace_estimator=hutch_trace, noise_dist=prior), solver="dopri5", sensitivity=sensitivity,
            atol=TOLERANCE, rtol=TOLERANCE, return_t_eval=False,
        ),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        end = model(wines)[-1]
        loss = (end[:, 0] - prior.log_prob(end[:, 1:])).mean() / size
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@attr.s
class Floor(EventCallback):
    """Turns a falling ball around, with less speed."""

    restitution = attr.ib()

    def check_event(self, t: Tensor, x: Tensor) -> bool:
        return bool(x[0] <= 0)

    def jump_map(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x[0].abs() + 1e-6, -self.restitution * x[1]])


def bouncing_ball(solver: str, steps: int = 10) -> tuple[float, list[float]]:
    """Learn how much speed a ball keeps when it bounces, from where it is after two bounces.

    Returns:
        What was learned of the true 0.8, and the losses on the way.
    """
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    times = torch.linspace(0, 1.25, 6, dtype=torch.float64)

    def fall(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x[1], -9.81 - 0.1 * x[1] * x[1].abs()])

    def end(restitution: Tensor, solver: str) -> Tensor:
        return odeint_hybrid(fall, start, times, 10, solver, [Floor(restitution)], 1e-6, 1e-6)[1][-1]

    observed = end(torch.tensor(0.8, dtype=torch.float64), "tsit5")
    restitution = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([restitution], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((end(restitution, solver) - observed) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return restitution.item(), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sensitivity", default="symplectic_adjoint", help='or "autograd", "adjoint"')
    sensitivity = parser.parse_args().sensitivity
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    trained = classify(sensitivity, epochs=10)
    print(f"classifier: {trained.accuracy:.1%} of held-out tumours, {trained.resumed_accuracy:.1%} after resuming")
    losses = flow(sensitivity, steps=100)
    print(f"flow: {losses[0]:.3f} nats per measurement at first, {losses[-1]:.3f} at the end")
    # odeint_hybrid has no sensitivity: there the flag is part of the solver's name.
    solver = "symplectic_adjoint:tsit5" if sensitivity == "symplectic_adjoint" else "tsit5"
    restitution, losses = bouncing_ball(solver, steps=40)
    print(f"ball: it keeps {restitution:.3f} of its speed, loss {losses[0]:.1e} at first, {losses[-1]:.1e} at the end")


if __name__ == "__main__":
    main()
