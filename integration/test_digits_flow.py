"""The digits program trains alike with backpropagation and with the symplectic adjoint: only one string differs."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from integration.digits_flow import (
    Digits,
    Flow,
    evaluate,
    load,
    negative_log_likelihood,
    rademacher_like,
    sample,
    train,
)

BACKPROPAGATION = "dopri5"
FLAGS = ["symplectic_adjoint", "symplectic_adjoint:dopri5"]
BATCH = 48


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, and no waiting for a second thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Digits:
    training, _ = load()
    tensors = {name: value.double() for name, value in vars(training).items() if value.is_floating_point()}
    return replace(training, **tensors)


def moving_flow() -> Flow:
    """A flow in float64 that is not at rest, as a new one is."""
    torch.manual_seed(1)
    flow = Flow(hidden=48).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize("flag", FLAGS)
def test_gradients_agree_to_rounding(digits: Digits, flag: str) -> None:
    flow = moving_flow()
    z, labels = digits.sample_batch(BATCH)
    flow.begin(labels, rademacher_like(z))

    def loss_and_gradients(method: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = negative_log_likelihood(flow, z.clone(), method)
        return loss, torch.autograd.grad(loss, list(flow.parameters()))

    loss, gradients = loss_and_gradients(flag)
    expected_loss, expected = loss_and_gradients(BACKPROPAGATION)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-14, atol=0)
    for (name, _), ours, theirs in zip(flow.named_parameters(), gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm(), name


def test_training_takes_the_same_course(digits: Digits) -> None:
    def course(method: str) -> tuple[list[float], float]:
        flow = moving_flow()
        average, losses = train(flow, digits, method, steps=4, batch=BATCH)
        return losses, evaluate(average, digits, method)

    losses, final = course(FLAGS[0])
    expected_losses, expected_final = course(BACKPROPAGATION)
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert final == pytest.approx(expected_final, rel=1e-9)
    assert losses[-1] < losses[0]


def test_samples_are_the_same(digits: Digits) -> None:
    def images(method: str) -> Tensor:
        flow = moving_flow().float()
        return digits.images(sample(flow, torch.arange(10), method).double())

    torch.testing.assert_close(images(FLAGS[0]), images(BACKPROPAGATION))
