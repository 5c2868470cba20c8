"""Minari data sets: written and read again, and those of others read as pools."""

import numpy as np
import pytest
import torch

from experiments.cli import main
from experiments.datasets.minari import export_pool, pool_from_minari, write_minari
from experiments.datasets.pools import Pool, make_pool
from experiments.envs.tasks import find_task, make_env
from rewardmodels import Clips, InvalidInput, UnreadableFile

minari = pytest.importorskip("minari")
EpisodeBuffer = pytest.importorskip("minari.data_collector").EpisodeBuffer


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    few = {"steps": 4096, "levels": 3, "episodes": 2, "progress": False}
    return make_pool("Pendulum", folder=tmp_path_factory.mktemp("pools"), **few)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Makes data sets with Minari's own function, by name, in a folder of Minari's."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def make(name, buffers, observations=None, actions=None):
        from gymnasium.spaces import Box

        with pytest.warns(UserWarning, match="None"):  # each field that is left out
            minari.create_dataset_from_buffers(
                name,
                buffers,
                observation_space=observations or Box(-9, 9, (2,), np.float64),
                action_space=actions or Box(-9, 9, (1,), np.float64),
            )
        return name

    return make


def buffer(rewards, observations=None, **more):
    steps = len(rewards)
    if observations is None:
        observations = np.arange(2.0 * (steps + 1)).reshape(steps + 1, 2) / 100
    return EpisodeBuffer(
        observations=observations,
        actions=more.pop("actions", np.arange(float(steps))[:, None] / 100),
        rewards=np.asarray(rewards, float),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(steps) == steps - 1,
        **more,
    )


def test_a_pool_is_read_again_but_for_each_episodes_first_frame(pool, tmp_path):
    write_minari(pool, tmp_path / "set", name="Pendulum")
    again = pool_from_minari(tmp_path / "set")
    for name in ("observations", "actions", "rewards", "states", "mask"):
        was, now = (getattr(p.trajectories, name) for p in (pool, again))
        torch.testing.assert_close(now, was[:, 1:], rtol=0, atol=0)
    assert (again.task, again.seed) == ("Pendulum", 0)
    assert torch.equal(again.skill, pool.skill)
    assert torch.equal(again.steps, pool.steps)
    assert {p.name for p in tmp_path.iterdir()} == {"set"}


def test_minari_reads_the_set_and_its_environment_repeats_the_episodes(pool, tmp_path):
    write_minari(pool, tmp_path / "set", name="Pendulum")
    data = minari.MinariDataset(tmp_path / "set" / "data")
    assert (data.total_episodes, data.total_steps) == (6, 6 * 199)
    assert data.spec.dataset_id == "rewardmodels/Pendulum-v0"
    assert (data.env_spec.id, data.env_spec.max_episode_steps) == ("Pendulum-v1", 200)
    about = list(data.storage.get_episode_metadata(range(6)))
    assert [one["policy_steps"] for one in about] == pool.steps[pool.skill].tolist()
    episode = data[3]
    assert episode.observations.shape == (200, 3)
    assert episode.truncations.tolist() == 198 * [False] + [True]
    assert not episode.terminations.any()
    angle = np.arctan2(episode.observations[:-1, 1], episode.observations[:-1, 0])
    turns = np.cos(angle - episode.infos["state"][:, 0])  # the state is that of the observation
    np.testing.assert_allclose(turns, 1, atol=1e-5)
    with data.recover_environment() as env:
        env.reset(seed=0)
        for frame in range(0, 199, 20):
            env.unwrapped.state = episode.infos["state"][frame].astype(float)
            led_to, reward, *_ = env.unwrapped.step(episode.actions[frame])
            np.testing.assert_allclose(episode.observations[frame + 1], led_to, atol=1e-3)
            assert episode.rewards[frame] == pytest.approx(reward, rel=1e-3, abs=1e-3)


def test_a_half_written_set_is_never_left_and_none_is_overwritten(pool, tmp_path, monkeypatch):
    from minari.dataset.minari_storage import MinariStorage

    out = tmp_path / "set"
    out.mkdir()
    with pytest.raises(InvalidInput, match="out"):
        write_minari(pool, out, name="Pendulum")
    with pytest.raises(InvalidInput, match="out"):
        export_pool("Pendulum", pools=tmp_path / "pools", out=out)  # before it trains
    out.rmdir()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(MinariStorage, "update_metadata", full)
    with pytest.raises(OSError, match="No space left"):
        write_minari(pool, out, name="Pendulum")
    assert not list(tmp_path.iterdir())


def test_discrete_actions_without_states_are_kept(tmp_path):
    with make_env(find_task("CartPole-v1")) as env:
        env.reset(seed=0)
    episodes = Clips(
        torch.rand(2, 5, 4), torch.randint(2, (2, 5)), rewards=torch.ones(2, 5)
    )  # discrete, without states
    few = Pool("CartPole-v1", 3, episodes, torch.tensor([0, 1]), torch.tensor([0, 2048]))
    write_minari(few, tmp_path / "set", name="CartPole")
    again = pool_from_minari(str(tmp_path / "set"))
    assert torch.equal(again.trajectories.actions, episodes.actions[:, 1:])
    assert again.trajectories.states is None
    assert again.seed == 3


def test_episodes_without_a_skill_are_ranked_by_return(foreign):
    # Of 12 episodes, whose returns are 11, 0, 10, 1, ..., and lengths 3, 4, 3, 4, ...
    returns = [11 - i // 2 if i % 2 == 0 else i // 2 for i in range(12)]
    name = foreign("mine/ranked-v0", [
        buffer([0.0, *(i % 2) * [0.0], 0.0, value + 0.5]) for i, value in enumerate(returns)
    ])  # fmt: skip
    found = pool_from_minari(name, levels=4)
    assert found.skill.tolist() == [value // 3 for value in returns]
    assert found.steps.tolist() == 4 * [-1]
    assert found.returns.tolist() == [value + 0.5 for value in returns]
    assert found.trajectories.lengths.tolist() == 6 * [3, 4]
    assert found.task == name
    # A frame is an action and the observation that it led to.
    assert found.trajectories.actions[1, :, 0].tolist() == pytest.approx([0, 0.01, 0.02, 0.03])
    assert found.trajectories.observations[1, :, 0].tolist() == pytest.approx(
        [0.02, 0.04, 0.06, 0.08]
    )
    assert len(pool_from_minari(name, levels=40).steps) == 12
    drawn = found.clips(8, 3, torch.Generator().manual_seed(0), skills=[3])
    assert float(drawn.returns.min()) >= 9.5


def test_dictionaries_of_observations_are_concatenated(foreign):
    from gymnasium.spaces import Box, Dict

    parts = {"goal": np.full((4, 1), 7.0), "place": np.arange(8.0).reshape(4, 2)}
    space = Dict({"goal": Box(-9, 9, (1,)), "place": Box(-9, 9, (2,))})
    name = foreign("mine/parts-v0", [buffer([1.0, 2.0, 3.0], parts)], space)
    (seen,) = pool_from_minari(name).trajectories.observations
    assert seen.tolist() == [[7, 2, 3], [7, 4, 5], [7, 6, 7]]


def test_sets_without_rewards_are_refused(foreign, tmp_path):
    for i, rewards in enumerate(([0.0, 0.0], [1.0, np.nan])):
        name = foreign(f"mine/bare{i}-v0", [buffer(rewards)])
        with pytest.raises(InvalidInput, match="name_or_path"):
            pool_from_minari(name)
    with pytest.raises(InvalidInput, match="mine/none-v0"):
        pool_from_minari("mine/none-v0")
    with pytest.raises(InvalidInput, match="levels"):
        pool_from_minari("mine/none-v0", levels=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableFile, match="empty"):
        pool_from_minari(tmp_path / "empty")


def test_damaged_sets_are_refused_by_name(pool, tmp_path):
    write_minari(pool, tmp_path / "set", name="Pendulum")
    file = tmp_path / "set" / "data" / "main_data.hdf5"
    whole = file.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"nonsense" * 100):
        file.write_bytes(damage)
        with pytest.raises(UnreadableFile, match="set"):
            pool_from_minari(tmp_path / "set")


def test_the_command_makes_one_that_minari_finds_by_name(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    words = ["pool", "--task=Pendulum", "--steps=2048", "--seed=1", "--levels=2", "--episodes=1"]
    assert main(words) == 0
    assert "2 episodes of 2 skills" in capfd.readouterr().out
    found = pool_from_minari("rewardmodels/Pendulum-2048-steps-seed-1-v0")
    assert (found.task, found.seed, len(found.steps)) == ("Pendulum", 1, 2)
    assert main([*words, "--out", "elsewhere"]) == 0
    assert len(pool_from_minari("elsewhere").trajectories) == 2
    assert main([*words, "--out", "elsewhere"]) == 2
    assert "out: " in capfd.readouterr().err


def test_a_study_takes_a_data_set_for_a_pool(pool, tmp_path, capsys):
    write_minari(pool, tmp_path / "data", name="tiny")
    words = f"""study strategies --tasks [minari:{tmp_path / "data"}] --strategies [BALD] --seeds 1
        --budget 20 --batch 10 --clips 12 --length 10 --tests 20 --out {tmp_path / "out"}"""
    assert main(words.split()) == 0
    assert "| BALD |" in capsys.readouterr().out


def test_a_data_set_that_is_not_there_is_refused_before_any_work(tmp_path, capsys):
    words = f"study strategies --tasks [minari:{tmp_path / 'none'}] --out {tmp_path / 'out'}"
    assert main(words.split()) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells").exists()
