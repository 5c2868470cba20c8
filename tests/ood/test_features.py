import numpy as np
import pytest
import torch

from ood.features import FEATURES, feature_names, find_features, hidden_layer
from rewardmodels import Clips, Comparisons, DeepEnsemble, LaplaceHead, fit
from rewardmodels.errors import InvalidInput, UnknownName

BEFORE, ACTION, AFTER = np.full((2, 3), 1.0), np.full((2, 2), 2.0), np.full((2, 3), 3.0)


def test_rows_and_names():
    expected = {"observation": "aaa", "observation_action": "aaaxx", "transition": "bbbxxaaa"}
    value = {"a": 3.0, "x": 2.0, "b": 1.0}
    prefix = {"a": "observation[", "x": "action[", "b": "observation before["}
    for name, kinds in expected.items():
        features = FEATURES[name](BEFORE, ACTION, AFTER)
        assert features.tolist() == [[value[kind] for kind in kinds]] * 2
        names = feature_names(name, 3, 2)
        assert all(n.startswith(prefix[k]) for n, k in zip(names, kinds, strict=True))
        assert len(set(names)) == len(kinds)
    discrete = FEATURES["observation_action"](BEFORE, np.array([0, 1]), AFTER)
    assert discrete[:, 3].tolist() == [0, 1]
    assert feature_names(lambda before, action, after: after, 3, 2) is None
    with pytest.raises(UnknownName):
        find_features("observatoin")


def test_hidden_layer_is_the_models_as_it_was():
    clips = Clips(torch.randn(4, 5, 3), torch.randn(4, 5, 2))
    comparisons = Comparisons(clips, torch.tensor([[0, 1], [2, 3]]), torch.ones(2))
    model = fit(LaplaceHead(hidden=(8, 4)), comparisons, epochs=1)
    after, action = AFTER.astype(np.float32), ACTION.astype(np.float32)
    inputs = model.inputs(torch.from_numpy(after), torch.from_numpy(action))
    for layer in model.network.body.layers:
        inputs = torch.nn.functional.silu(layer(inputs))
    features = hidden_layer(model)
    np.testing.assert_allclose(features(BEFORE, action, after), inputs.detach(), rtol=1e-5)
    fit(model, comparisons, epochs=2)
    np.testing.assert_allclose(features(BEFORE, action, after), inputs.detach(), rtol=1e-5)
    for wrong in (LaplaceHead(), fit(DeepEnsemble(members=2), comparisons, epochs=1)):
        with pytest.raises(InvalidInput, match="model"):
            hidden_layer(wrong)
