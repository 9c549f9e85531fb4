"""The programs take the same course with backpropagation and with the flag: only one string differs."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("torchdyn")

from .hosts import FLAG
from .torchdyn_programs import bouncing_ball, classify, flow

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def test_a_classifier_reaches_the_accuracy_of_backpropagation_and_resumes(tmp_path) -> None:
    ours, theirs = (classify(way, epochs=4, folder=str(tmp_path)) for way in (FLAG, "autograd"))
    assert ours.accuracy >= theirs.accuracy - 0.01
    assert ours.accuracy >= 0.93  # measured: 0.972 for both
    # The half that was trained twice, the second time from the file, is the same.
    assert ours.resumed_accuracy == ours.accuracy
    # Backpropagation also goes through the choice of the first step size, so the parameters are not quite the same.
    assert torch.linalg.vector_norm(ours.parameters - theirs.parameters) <= 0.05 * theirs.parameters.norm()


def test_a_normalizing_flow_takes_the_same_course() -> None:
    ours, theirs = (flow(way, steps=10) for way in (FLAG, "autograd"))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < ours[0] - 0.1


def test_a_bouncing_ball_takes_the_same_course() -> None:
    ours, theirs = (bouncing_ball(way) for way in (f"{FLAG}:tsit5", "tsit5"))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    assert ours[1][-1] < ours[1][0] / 2
