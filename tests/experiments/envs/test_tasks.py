from dataclasses import replace
from itertools import product

import gymnasium as gym
import numpy as np
import pytest

from experiments.envs import vector
from experiments.envs.tasks import TASKS, Task, find_task, make_env
from experiments.envs.vector import make_vec_env
from rewardmodels.errors import InvalidInput, UnknownName

ON_ENVPOOL = sorted(name for name, task in TASKS.items() if not task.ends_early)
PLAIN = [name for name in ON_ENVPOOL if TASKS[name].reward is None]
OWN_HORIZON = {"InvertedPendulum"}  # where ours isn't Gymnasium's limit
HEAVY = replace(TASKS["Ant"], kwargs={"torso": 1})


def random_actions(space, n_envs, n_steps, seed=0):
    size = (n_steps, n_envs, *space.shape)
    return np.random.default_rng(seed).uniform(space.low, space.high, size).astype(np.float32)


def play(venv, n_steps, seed=0):
    actions = random_actions(venv.action_space, venv.num_envs, n_steps, seed)
    return venv.reset(), [venv.step(a) for a in actions]


@pytest.mark.parametrize("name", sorted(set(TASKS) - OWN_HORIZON))
def test_horizon_is_gymnasiums_own_limit(name):
    assert TASKS[name].horizon == gym.spec(TASKS[name].env_id).max_episode_steps


@pytest.mark.parametrize("name", ["Hopper", "Walker2d", "Ant", "InvertedPendulum"])
def test_the_horizon_alone_ends_an_episode(name):
    task = replace(TASKS[name], horizon=400)

    def lengths(env, rule):
        env.reset(seed=1)
        env.action_space.seed(1)
        for step in range(1, task.horizon + 1):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                return step, terminated
        raise AssertionError(rule)

    early, fell = lengths(gym.make(task.env_id), "Gymnasium ends it when the agent falls")
    assert fell
    assert early < 400
    assert lengths(make_env(task), "horizon") == (task.horizon, False)


def test_inverted_pendulums_return_counts_the_steps_for_which_the_pole_is_up():
    env = make_env(TASKS["InvertedPendulum"])
    env.reset(seed=0)
    rewards = []
    for _ in range(300):
        observation, reward, *_ = env.step(np.array([3.0], np.float32))
        rewards.append(reward)
        assert reward == float(abs(observation[1]) <= 0.2)
    assert 0 < sum(rewards) < 100


@pytest.mark.parametrize("name", PLAIN)
def test_envpool_takes_the_steps_that_gymnasium_takes(name):
    # Across an episode's end too, so that no action is lost to a reset.
    task = replace(TASKS[name], horizon=30)
    venv = make_vec_env(task, 3, seed=0, backend="envpool", threads=1)
    single = make_env(TASKS[name])
    single.reset(seed=0)
    simulator = single.unwrapped
    venv.reset()
    errors = []
    # Gentle actions, for Hopper's and Walker2d's observations clip their velocities.
    for actions in 0.3 * random_actions(venv.action_space, 3, 70):
        before = venv.states().astype(float)
        after, rewards, dones, infos = venv.step(actions)
        for i in range(3):
            if name in ("Hopper", "Walker2d") and np.abs(before[i]).max() >= 10:
                continue
            if name == "Pendulum":
                simulator.state = before[i]
            else:
                simulator.set_state(*np.split(before[i], [simulator.model.nq]))
            observation, reward, *_ = simulator.step(actions[i])
            reached = infos[i]["terminal_observation"] if dones[i] else after[i]
            moved = slice(27 if name == "Ant" else None)  # what follows are its contact forces
            errors.append(max(abs(rewards[i] - reward), *abs(reached - observation)[moved]))
    assert len(errors) > 150
    # The state is rounded to float32, which shows where a body strikes the ground in this step.
    assert np.median(errors) < 1e-3
    assert max(errors) < 0.1


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *product(ON_ENVPOOL, ["envpool", "gymnasium"]),
        *product(sorted(set(TASKS) - set(ON_ENVPOOL)), ["auto"]),
    ],
)
def test_an_episodes_end_is_as_stable_baselines_wants_it(name, backend):
    short = make_vec_env(replace(TASKS[name], horizon=10), 2, seed=3, backend=backend, threads=1)
    long = make_vec_env(replace(TASKS[name], horizon=99), 2, seed=3, backend=backend, threads=1)
    first, cut = play(short, 25)
    _, uncut = play(long, 10)
    assert [step for step, (_, _, dones, _) in enumerate(cut, 1) if dones.any()] == [10, 20]
    assert first.dtype == cut[0][0].dtype == short.observation_space.dtype == np.float32
    for i in range(2):
        assert "terminal_observation" not in cut[8][3][i]
        assert not cut[8][3][i].get("TimeLimit.truncated", False)
        # The very observation that an episode without an end goes on from.
        np.testing.assert_array_equal(cut[9][3][i]["terminal_observation"], uncut[9][0][i])
        assert cut[9][3][i]["TimeLimit.truncated"] is True
        # What comes back is a new episode's first: unlike the last one's, and unlike its first.
        assert not np.array_equal(cut[9][0][i], uncut[9][0][i])
        assert not np.array_equal(cut[9][0][i], first[i])
    for (_, r, _, _), (_, s, _, _) in zip(cut[:10], uncut, strict=True):
        np.testing.assert_array_equal(r, s)


def test_gymnasiums_copies_are_plain_environments():
    task = replace(TASKS["Hopper"], horizon=15)
    venv = make_vec_env(task, 2, seed=7, backend="gymnasium")
    first, steps = play(venv, 20)
    for i in range(2):
        env = gym.make("Hopper-v5", terminate_when_unhealthy=False)
        np.testing.assert_array_equal(first[i], env.reset(seed=7 + i)[0].astype(np.float32))
        for t, action in enumerate(random_actions(venv.action_space, 2, 20)[:, i]):
            observation, reward, *_ = env.step(action)
            got, last = steps[t][0][i], steps[t][3][i].get("terminal_observation")
            np.testing.assert_array_equal(got if last is None else last, np.float32(observation))
            assert steps[t][1][i] == np.float32(reward)
            if t == 14:
                (second,) = np.random.SeedSequence([7 + i, 1]).generate_state(1)
                begun = np.float32(env.reset(seed=int(second))[0])
                np.testing.assert_array_equal(steps[t][0][i], begun)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_the_seed_decides_everything_from_the_next_reset_on(backend):
    task = replace(TASKS["HalfCheetah"], horizon=10)

    def whole(venv):
        first, steps = play(venv, 25)
        return np.stack([first, *(step[0] for step in steps)])

    venv = make_vec_env(task, 3, seed=5, backend=backend)
    one = whole(venv)
    other = whole(make_vec_env(task, 3, seed=6, backend=backend))
    np.testing.assert_array_equal(one, whole(make_vec_env(task, 3, seed=5, backend=backend)))
    np.testing.assert_array_equal(one[0, 1:], other[0, :-1])  # copy i starts from seed + i
    assert not np.array_equal(one[0, 0], one[0, 1])
    venv.seed(6)
    np.testing.assert_array_equal(whole(venv), other)
    assert not np.array_equal(venv.reset(), other[0])


class Noisy(gym.Wrapper):
    """Draws in each step, and not just in resets."""

    def step(self, action):
        return super().step(action + self.np_random.normal(size=action.shape))


@pytest.mark.parametrize(
    ("name", "backend"),
    [("Hopper", "envpool"), ("Hopper", "gymnasium"), ("noisy", "gymnasium")],
)
def test_an_episode_goes_on_in_another_process(name, backend, monkeypatch):
    task = replace(TASKS["Pendulum" if name == "noisy" else name], horizon=20)
    if name == "noisy":
        monkeypatch.setattr(vector, "make_env", lambda task: Noisy(make_env(task)))
    one, other = (make_vec_env(task, 3, seed=4, backend=backend) for _ in range(2))
    one.reset()
    for _ in range(2):
        one.reset()
    actions = random_actions(one.action_space, 3, 80)
    for action in actions[:50]:  # the third of these episodes lasts since step 40
        one.step(action)
    assert one.episodes() == [5, 5, 5]
    other.resume(one.episodes(), list(actions[40:50].swapaxes(0, 1)))
    for action in actions[50:]:
        for mine, theirs in zip(one.step(action)[:3], other.step(action)[:3], strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_gymnasiums_states_bring_the_observation_back(name):
    venv = make_vec_env(TASKS[name], 2, seed=0, backend="gymnasium")
    play(venv, 5)
    env = make_env(TASKS[name])
    env.reset(seed=9)
    simulator = env.unwrapped
    for i, state in enumerate(venv.states().astype(float)):
        if name == "Pendulum":
            simulator.state = state
        else:
            simulator.set_state(*np.split(state, [simulator.model.nq]))
        seen = TASKS[name].observed(simulator._get_obs())
        if name == "Ant":  # contact forces are known only after a step
            seen, got = seen[:27], venv._obs_from_buf()[i][:27]
        else:
            got = venv._obs_from_buf()[i]
        np.testing.assert_allclose(got, seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: find_task("Hoper"), "Hoper"),
        (lambda: find_task("CartPol-v1"), "CartPol-v1"),
        (lambda: Task("Hopper", "Hopper-v5", 0), "horizon"),
        (lambda: make_vec_env(TASKS["Hopper"], 2, 0, backend="envpol"), "backend"),
        (lambda: make_vec_env(TASKS["InvertedPendulum"], 2, 0, backend="envpool"), "backend"),
        (lambda: make_vec_env(HEAVY, 2, 0, backend="envpool"), "torso"),
        (lambda: make_vec_env(TASKS["Hopper"], 0, 0), "n_envs"),
    ],
)
def test_tasks_and_backends_that_there_cannot_be_are_refused(call, argument):
    with pytest.raises((InvalidInput, UnknownName), match=argument):
        call()


def test_an_environment_without_a_time_limit_is_refused():
    gym.register("Endless-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    try:
        with pytest.raises(InvalidInput, match="max_episode_steps"):
            find_task("Endless-v0")
    finally:
        del gym.registry["Endless-v0"]


def test_any_gymnasium_id_is_a_task():
    venv = make_vec_env(find_task("MountainCarContinuous-v0"), 2, 0)
    _, steps = play(venv, 999)
    assert [t for t, step in enumerate(steps, 1) if step[2].any()] == [999]
    assert venv.states().shape == (2, 2)
