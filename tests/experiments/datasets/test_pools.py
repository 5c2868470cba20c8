"""Pools: episodes against Gymnasium's own environments, cutting of clips, and files."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.datasets import minari as minari_pools
from experiments.datasets import pools
from experiments.datasets.minari import export_pool, pool_from_minari
from experiments.datasets.pools import Pool, make_pool
from experiments.envs.rollout import play_agent
from experiments.envs.tasks import find_task, make_env
from rewardmodels import Clips, InvalidInput, RewardModelsError, UnreadableFile

pytestmark = pytest.mark.usefixtures("_short_updates")

TINY = {"steps": 4096, "levels": 3, "episodes": 2, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pools")


@pytest.fixture(scope="module")
def made(folder):
    return make_pool("Pendulum", folder=folder, **TINY)


@pytest.fixture
def no_training(monkeypatch):
    class Trained(Exception):
        pass

    def train(*_, **__):
        raise Trained

    monkeypatch.setattr(pools, "ppo_on_own_reward", train)
    return Trained


@pytest.fixture
def by_hand():
    """Three skills of 2, 1 and 3 episodes; a frame says its skill, its episode and its place."""
    skill = torch.tensor([0, 0, 1, 2, 2, 2])
    episode, place = torch.arange(6.0).expand(40, 6).T, torch.arange(40.0).expand(6, 40)
    frames = torch.stack([skill[:, None].expand(6, 40).float(), episode, place], 2)
    episodes = Clips(frames, torch.zeros(6, 40, 1), rewards=place.clone())
    return Pool("Hopper", 0, episodes, skill, torch.tensor([0, 2048, 4096]))


def same(one, other):
    columns = ("observations", "actions", "rewards", "states", "mask")
    return all(
        torch.equal(getattr(one.trajectories, name), getattr(other.trajectories, name))
        for name in columns
    )


def replay(task, clips):
    """Rewards and observations of Gymnasium's own environment, stepped from each state."""
    with make_env(find_task(task)) as env:
        env.reset(seed=0)
        simulator = env.unwrapped
        for clip in range(len(clips)):
            for frame in range(clips.length):
                simulator.state = clips.states[clip, frame].double().numpy()
                action = clips.actions[clip, frame].numpy()
                led_to, reward, *_ = simulator.step(action if action.ndim else int(action))
                yield clip, frame, led_to, reward


def agrees_with_replay(task, clips):
    for clip, frame, led_to, reward in replay(task, clips):
        if task != "Pendulum" or abs(led_to[2]) < 8:  # EnvPool's turns on as if past the limit
            np.testing.assert_allclose(clips.observations[clip, frame], led_to, atol=1e-3)
        assert float(clips.rewards[clip, frame]) == pytest.approx(reward, rel=1e-3, abs=1e-3)


def test_it_holds_whole_episodes_of_each_policy(made):
    assert made.skill.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(made.steps.tolist()) == [0, 2048, 4096]
    assert made.trajectories.observations.shape == (6, 200, 3)
    assert made.trajectories.actions.shape == (6, 200, 1)
    assert made.trajectories.mask.all()
    means = [float(made.returns[made.skill == k].mean()) for k in range(3)]
    assert means == sorted(means)
    starts = made.trajectories.states[:, 0]
    assert len(starts.unique(dim=0)) == 6  # no two episodes alike


def test_rewards_and_observations_are_what_the_actions_led_to(made):
    agrees_with_replay("Pendulum", made.trajectories)
    # Pendulum's reward in closed form, from the state before and the torque.
    angle, speed = made.trajectories.states.double().unbind(2)
    angle = torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi
    torque = made.trajectories.actions[..., 0].double().clamp(-2, 2)
    paid = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    torch.testing.assert_close(made.returns.double(), paid.sum(1), rtol=1e-4, atol=1e-2)


def test_discrete_actions_and_gymnasiums_own_environments_and_a_bar(tmp_path, capfd):
    pool = make_pool("MountainCar-v0", folder=tmp_path, steps=2048, levels=2, episodes=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "level 2/2, return -200" in err
    assert set(pool.trajectories.actions.unique().tolist()) == {0, 1, 2}
    agrees_with_replay("MountainCar-v0", pool.trajectories)


def test_the_same_seed_makes_the_same_pool_and_leaves_the_callers_randomness(
    made, tmp_path, monkeypatch, capfd
):
    threads = []

    def watched(*args, **named):
        threads.append(torch.get_num_threads())
        return play_agent(*args, **named)

    def draw():
        return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002

    monkeypatch.setattr(pools, "play_agent", watched)

    def seed_all():
        random.seed(123)
        np.random.seed(123)  # noqa: NPY002
        torch.manual_seed(123)

    seed_all()
    expected = draw()
    seed_all()
    torch.set_num_threads(2)
    try:
        again = make_pool("Pendulum", folder=tmp_path, **TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == [1, 1, 1]
    assert draw() == expected
    assert same(made, again)
    assert capfd.readouterr() == ("", "")  # progress=False


def test_recording_does_not_change_training(made, tmp_path):
    fewer = make_pool("Pendulum", folder=tmp_path, **TINY | {"levels": 2})
    for skill, step in enumerate(fewer.steps):
        (there,) = (made.steps == step).nonzero().tolist()[0]
        rows, others = fewer.skill == skill, made.skill == there
        torch.testing.assert_close(
            fewer.trajectories[rows].actions, made.trajectories[others].actions, rtol=0, atol=0
        )


def test_policies_explore_as_in_training_and_skills_go_by_mean_return(made, tmp_path, monkeypatch):
    said = [(1.0, 9.0), (3.0, 3.0)]
    noise = []

    def watched(agent, normalised, task, **named):
        clips = play_agent(agent, normalised, task, **named)
        before, taken = clips.observations[:, :-1], clips.actions[:, 1:]
        for seen, action in zip(before, taken, strict=True):
            # The mean action at what the policy saw; where it stays clear of the bounds.
            mean, _ = agent.predict(normalised.normalize_obs(seen.numpy()), deterministic=True)
            clear = (np.abs(mean) < 0.5) & (np.abs(action.numpy()) < 1.99)
            noise.append((action.numpy() - mean)[clear])
        rewards = torch.zeros(clips.mask.shape)
        rewards[:, 0] = torch.tensor(said.pop(0))
        return Clips(clips.observations, clips.actions, rewards=rewards)

    monkeypatch.setattr(pools, "play_agent", watched)
    once = {"steps": 2048, "levels": 2}
    pool = make_pool("Pendulum", folder=tmp_path, seed=1, **TINY | once)
    assert pool.steps.tolist() == [2048, 0]
    assert pool.returns.tolist() == [3, 3, 1, 9]
    assert pool.trajectories.states is None
    assert (
        len(torch.cat([pool.trajectories.actions, made.trajectories.actions]).unique(dim=0)) == 10
    )
    # The policy's standard deviation starts as exp(-0.5), and one update hardly changes it.
    assert np.concatenate(noise).std() == pytest.approx(np.exp(-0.5), rel=0.05)
    assert abs(np.concatenate(noise).mean()) < 0.1


def test_a_pool_is_made_once(made, folder, no_training):
    again = make_pool("Pendulum", folder=folder, **TINY)
    assert same(made, again)
    assert (again.task, again.seed) == ("Pendulum", 0)
    assert torch.equal(made.skill, again.skill)
    assert torch.equal(made.steps, again.steps)
    for changed in ({"seed": 1}, {"steps": 5000}, {"levels": 2}, {"episodes": 1}):
        with pytest.raises(no_training):
            make_pool("Pendulum", folder=folder, **TINY | changed)
    with pytest.raises(no_training):
        make_pool("Reacher", folder=folder, **TINY)


def test_damaged_files_are_refused_by_name(made, folder, tmp_path, no_training):
    (good,) = folder.iterdir()
    bad = tmp_path / good.name
    tensors = load_file(good)
    poisoned = tensors | {"rewards": tensors["rewards"] / 0}
    without = {name: value for name, value in tensors.items() if name != "skill"}
    misfit = tensors | {"skill": tensors["skill"] + 1}
    for damage in (
        lambda: bad.write_bytes(good.read_bytes()[:-1000]),
        lambda: bad.write_bytes(b""),
        lambda: bad.write_bytes(b"not a pool" * 100),
        lambda: save_file(poisoned, bad),
        lambda: save_file(without, bad),
        lambda: save_file(misfit, bad),
    ):
        damage()
        with pytest.raises(UnreadableFile, match="pool") as caught:
            make_pool("Pendulum", folder=tmp_path, **TINY)
        assert str(bad) in str(caught.value)


def test_concurrent_and_interrupted_writers_leave_whole_files_or_none(made, tmp_path, monkeypatch):
    path, depth = tmp_path / "pool.safetensors", []

    def second_writer_in_the_middle(tensors, beside, header):
        save_file(tensors, beside, header)
        if depth:
            return
        depth.append(1)
        whole = beside.read_bytes()
        with open(beside, "wb") as file:
            file.write(whole[:1000])
            file.flush()
            pools._write(made, path)
            assert same(made, pools._read(path, "Pendulum", 0))
            file.write(whole[1000:])

    monkeypatch.setattr(pools, "save_file", second_writer_in_the_middle)
    pools._write(made, path)
    assert same(made, pools._read(path, "Pendulum", 0))
    assert list(tmp_path.iterdir()) == [path]

    def dies(tensors, beside, header):
        beside.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pools, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        pools._write(made, tmp_path / "other.safetensors")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"levels": 1}, "levels"),
        ({"episodes": 0}, "episodes"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"steps": 4095}, "steps"),
        ({"task": "Pendulun"}, "task"),
    ],
)
def test_invalid_arguments_are_refused_before_any_work(changed, argument, tmp_path, no_training):
    arguments = {"task": "Pendulum", "folder": tmp_path / "new", **TINY} | changed
    with pytest.raises(RewardModelsError, match=rf"^{argument}\b"):
        make_pool(**arguments)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cant_be_one_is_refused_before_any_work(tmp_path, no_training):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match="folder"):
            make_pool("Pendulum", folder=folder, **TINY)


def test_clips_are_stretches_of_one_episode(by_hand):
    clips = by_hand.clips(200, 7, torch.Generator().manual_seed(0))
    skill, episode, place = clips.observations.unbind(2)
    assert (skill == skill[:, :1]).all()
    assert (episode == episode[:, :1]).all()
    assert (place == place[:, :1] + torch.arange(7)).all()
    assert torch.equal(clips.rewards, place)
    assert set(place[:, 0].tolist()) == set(map(float, range(34)))
    assert set(episode[:, 0].tolist()) == set(map(float, range(6)))


@pytest.mark.parametrize(
    ("skills", "expected"),
    [
        (None, {0, 1, 2}),
        (range(1, 3), {1, 2}),
        (slice(-2, None), {1, 2}),
        ([2, 0], {0, 2}),
        ((1,), {1}),
    ],
)
def test_clips_are_shared_evenly_among_the_skills_asked_for(by_hand, skills, expected):
    def counts(n, seed):
        clips = by_hand.clips(n, 5, torch.Generator().manual_seed(seed), skills=skills)
        assert len(clips) == n
        return torch.bincount(clips.observations[:, 0, 0].long(), minlength=3)

    whole = counts(6 * len(expected), 0)
    assert whole.tolist() == [6 if k in expected else 0 for k in range(3)]
    # One clip too many goes to each skill in turn, by chance: by none less than 10 of 60 times,
    # for which the binomial (n = 60, p = 1/3) leaves 0.3%.
    more = sum(counts(1, seed) for seed in range(60))
    assert {k for k in range(3) if more[k] >= 10} == expected
    assert int(more.sum()) == 60


def test_order_is_random_and_follows_from_the_generator(by_hand):
    first, again = (by_hand.clips(30, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.observations, again.observations)
    skill = first.observations[:, 0, 0]
    # Sorted by skill there would be two changes; in random order 29 x 20/29 = 20 are expected.
    assert 12 <= int((skill[1:] != skill[:-1]).sum()) <= 28


@pytest.mark.parametrize(
    ("n", "length", "skills", "argument"),
    [
        (0, 5, None, "n"),
        (3, 0, None, "length"),
        (3, 41, None, "length"),
        (3, 5, [3], "skills"),
        (3, 5, [-1], "skills"),
        (3, 5, [], "skills"),
        (3, 5, slice(3, None), "skills"),
    ],
)
def test_invalid_arguments_of_clips_are_refused(by_hand, n, length, skills, argument):
    with pytest.raises(InvalidInput, match=rf"^{argument}\b"):
        by_hand.clips(n, length, torch.Generator(), skills=skills)


def test_pools_whose_parts_dont_fit_are_refused(by_hand):
    episodes, skill, steps = by_hand.trajectories, by_hand.skill, by_hand.steps
    bare = Clips(episodes.observations, episodes.actions)
    for parts, argument in (
        ((bare, skill, steps), "rewards"),
        ((episodes, skill[:5], steps), "skill"),
        ((episodes, skill.float(), steps), "skill"),
        ((episodes, skill, steps[:2]), "skill"),
    ):
        with pytest.raises(InvalidInput, match=argument):
            Pool("Hopper", 0, *parts)


def test_without_minari_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(minari_pools, "find_spec", lambda _: None)
    for call in (
        lambda: export_pool("Pendulum", out=tmp_path / "out"),
        lambda: pool_from_minari("anything"),
    ):
        with pytest.raises(InvalidInput, match=r"pip install 'rewardmodels\[minari\]'"):
            call()
    assert not list(tmp_path.iterdir())
