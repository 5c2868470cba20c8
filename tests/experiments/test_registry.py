"""Names find classes, and descriptions of objects make them again."""

import json

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from active import STRATEGIES, Hyperbolic, ScoredStrategy, SyntheticTeacher, preference_variance
from active.batch import Power
from experiments.registry import KINDS, describe, describe_settings, find_class
from experiments.training.config import LearnConfig
from rewardmodels import DeepEnsemble, InvalidInput
from rewardmodels.networks import MLP


@pytest.mark.parametrize("kind", KINDS)
def test_registered_classes_are_of_their_kind(kind):
    for name, registered in KINDS[kind].registered.items():
        found = find_class(kind, name)
        assert found is registered
        assert issubclass(getattr(found, "func", found), KINDS[kind].base)


def test_a_name_is_registered_or_an_import_path_with_or_without_arguments():
    assert find_class("strategy", "active.strategies.BALD") is STRATEGIES["BALD"]
    assert find_class("teacher", "stochastic(same_threshold=2)")().same_threshold == 2
    assert find_class("model", "rewardmodels.DeepEnsemble(members=3)")().members == 3
    assert find_class("model", "mine", {"mine": DeepEnsemble}) is DeepEnsemble


def test_objects_are_described_by_class_path_and_arguments():
    model = describe(DeepEnsemble(members=7, hidden=(3, 4), network=MLP))
    assert model["class_path"] == "rewardmodels.ensemble.DeepEnsemble"
    assert model["init_args"]["members"] == 7
    assert model["init_args"]["hidden"] == [3, 4]
    assert model["init_args"]["network"] == "rewardmodels.networks.MLP"
    scored = describe(ScoredStrategy(preference_variance, Power(2.0), samples=8))
    assert scored["init_args"] == {
        "acquisition": "preference_variance",
        "rule": describe(Power(2.0)),
        "samples": 8,
    }
    assert describe(Power(2.0))["init_args"] == {"power": 2.0}
    assert describe(json.dumps) == "json.dumps"


class Forgetful:
    def __init__(self, samples=3):
        pass


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Forgetful(), "samples isn't"),
        (DeepEnsemble(network=torch.nn.Linear(3, 2)), "top level of a module"),
        (ScoredStrategy(lambda returns, pairs: returns), "top level of a module"),
    ],
)
def test_objects_that_cannot_be_made_again_are_refused(value, reason):
    with pytest.raises(InvalidInput, match=reason):
        describe(value)


def test_settings_are_read_back_by_the_command_lines_parser():
    config = LearnConfig(
        task="Hopper",
        comparisons=33,
        model=DeepEnsemble(members=2, hidden=(5,), random_answer_rate=0.1),
        strategy=ScoredStrategy("preference_variance", Power(2.0), samples=8),
        schedule=Hyperbolic(initial=0.5, half_life=1000),
        teacher=SyntheticTeacher(rationality=3.0, same_threshold=0.25),
        pessimism=0.5,
    )
    settings = yaml.safe_load(yaml.safe_dump(describe_settings(config)))
    assert json.loads(json.dumps(settings)) == settings
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LearnConfig)
    again = LearnConfig(**parser.instantiate(parser.parse_object(settings)))
    assert describe_settings(again) == describe_settings(config)
    assert again.strategy.acquisition is preference_variance
