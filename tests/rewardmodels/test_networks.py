"""Normalisation against NumPy, batched members against single networks, convolutions."""

import numpy as np
import pytest
import torch

from rewardmodels import networks as networks_module
from rewardmodels.frames import RunningNorm
from rewardmodels.networks import CNN, PRIOR_GAIN, FrameNetwork, MemberMLP


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (30, 50, 20), (10,) * 10])
def test_norm_in_pieces_is_numpy_at_once(sizes):
    frames = torch.randn(100, 3) * torch.tensor([1.0, 50.0, 0.1]) + torch.tensor([0.0, 200.0, -5.0])
    norm = RunningNorm(3)
    for part in frames.split(list(sizes)):
        norm.update(part)
    np.testing.assert_allclose(norm.mean, frames.double().numpy().mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.variance, frames.double().numpy().var(0), rtol=1e-4)
    assert float(norm.count) == 100
    found = norm(frames)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(0, correction=0), 1, rtol=1e-4)


def test_a_constant_input_stays_small():
    norm = RunningNorm(1)
    norm.update(torch.full((50, 1), 7.0))
    assert float(norm(torch.tensor([[7.0]]))) == 0
    # What first differs after the training enters as it is.
    assert float(norm(torch.tensor([[7.5]]))) == 0.5
    norm.update(torch.full((50, 1), 7.0002))
    assert abs(float(norm(torch.tensor([[7.5]])))) <= 500.01


@pytest.mark.parametrize("together", [1, 10**6])  # one after the other, or all at once
@pytest.mark.parametrize("hidden", [(), (8,), (6, 4)])
def test_members_are_separate_networks(hidden, together, monkeypatch):
    monkeypatch.setattr(networks_module, "_TOGETHER", together)
    network, frames = MemberMLP(3, 5, hidden), torch.randn(11, 5)
    for bias in network.biases:
        torch.nn.init.normal_(bias)
    found = network(frames)
    assert found.shape == (3, 11)
    for member in range(3):
        layers: list[torch.nn.Module] = []
        for weight, bias in zip(network.weights, network.biases, strict=True):
            layer = torch.nn.Linear(weight.shape[2], weight.shape[1])
            layer.weight.data, layer.bias.data = weight[member].data, bias[member, :, 0].data
            layers += [layer, torch.nn.SiLU()]
        one = torch.nn.Sequential(*layers[:-1])(frames).squeeze(1)
        torch.testing.assert_close(found[member], one)


@pytest.mark.parametrize("together", [1, 10**6])
def test_a_member_learns_from_its_own_loss_alone(together, monkeypatch):
    monkeypatch.setattr(networks_module, "_TOGETHER", together)
    network = MemberMLP(3, 4, (6,))
    network(torch.randn(7, 4))[1].sum().backward()
    for parameter in network.parameters():
        assert (parameter.grad[[0, 2]] == 0).all()
        assert parameter.grad[1].abs().sum() > 0


@pytest.mark.parametrize("together", [1, 10**6])
def test_gradient_is_right_in_spite_of_working_in_place(together, monkeypatch):
    monkeypatch.setattr(networks_module, "_TOGETHER", together)
    network = MemberMLP(2, 3, (4, 4)).double()
    frames = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    names = [name for name, _ in network.named_parameters()]

    def call(frames: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(network, parameters, (frames,))

    assert torch.autograd.gradcheck(call, (frames, *network.parameters()))


def test_members_start_apart_and_as_linear_layers_do():
    network, linear = MemberMLP(40, 10, (30,)), torch.nn.Linear(10, 4000)
    weight, bias = network.weights[0].detach(), network.biases[0].detach()
    linear.requires_grad_(False)
    assert not torch.equal(weight[0], weight[1])
    for found, expected in ((weight, linear.weight), (bias, linear.bias)):
        assert float(found.abs().max()) == pytest.approx(float(expected.abs().max()), rel=0.02)
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.05)


@pytest.mark.parametrize(("inputs", "hidden"), [(23, (64, 64)), (8, (5, 5)), (100, (256, 256))])
def test_untrained_priors_are_of_about_one(inputs, hidden):
    outputs = MemberMLP(50, inputs, hidden, PRIOR_GAIN)(torch.randn(500, inputs)).detach()
    assert 0.5 < float(outputs.std(1).mean()) < 2


@pytest.mark.parametrize("image", [(1, 3, 3), (3, 64, 64), (4, 84, 84), (2, 5, 200)])
def test_a_cnn_sees_images_of_any_size(image):
    inputs = torch.Size(image).numel() + 2
    network = CNN(image, inputs, (7,))
    frames = torch.randn(4, inputs)
    found = network(frames)
    assert found.shape == (4, 7)
    # The same as the layers on images that were never flat.
    seen = network.convolutions(frames[:, :-2].view(4, *image)).flatten(1)
    torch.testing.assert_close(found, network.head(torch.cat([seen, frames[:, -2:]], 1)))


def test_a_frame_network_leaves_the_mode_of_its_body():
    body = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5))
    assert FrameNetwork(body, 3).body.training
    body.eval()
    assert not FrameNetwork(body, 3).body.training
