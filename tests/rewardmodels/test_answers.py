"""Minibatches of answers, against the rows that they were asked for."""

import torch

from rewardmodels import Clips, Comparisons, FitOptions
from rewardmodels.fitting import TrainingSet


def test_a_minibatch_is_the_rows_it_says():
    draw = torch.Generator().manual_seed(0)
    clips = Clips(torch.randn(20, 4, 3, generator=draw), torch.randn(20, 4, 1, generator=draw))
    pairs = torch.randperm(20, generator=draw).view(10, 2)
    answers = Comparisons(clips, pairs, torch.rand(10, generator=draw))
    data = TrainingSet.gather(answers, None, None, FitOptions(), seed=0)
    batch = data.batch(torch.tensor([9, 2]))
    assert batch.index.tolist() == [9, 2]
    assert torch.equal(batch.first.observations, clips.observations[pairs[[9, 2], 0]])
    assert torch.equal(batch.second.observations, clips.observations[pairs[[9, 2], 1]])
    assert torch.equal(batch.preference, answers.preference[[9, 2]])
