"""Minibatches of answers, against the rows that they were asked for."""

import torch

from rewardmodels import Clips, Comparisons
from rewardmodels.fitting import Answers


def test_a_minibatch_is_the_rows_it_says():
    draw = torch.Generator().manual_seed(0)
    clips = Clips(torch.randn(20, 4, 3, generator=draw), torch.randn(20, 4, 1, generator=draw))
    pairs = torch.randperm(20, generator=draw).view(10, 2)
    answers = Comparisons(clips, pairs, torch.rand(10, generator=draw))
    gathered = Answers.gather(answers, None, None, held_out=0, groups=None, seed=0)
    batch = gathered.batches(torch.tensor([2, 4, 9])).__getitems__([2, 0])
    assert batch.index.tolist() == [9, 2]
    assert torch.equal(batch.first.observations, clips.observations[pairs[[9, 2], 0]])
    assert torch.equal(batch.second.observations, clips.observations[pairs[[9, 2], 1]])
    assert torch.equal(batch.preference, answers.preference[[9, 2]])
