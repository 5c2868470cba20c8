"""Perturbations: after the onset the named thing differs, and nothing else, until a reset."""

import math
from itertools import product

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from experiments.envs.perturbations import PERTURBATIONS, PUSH_PERIOD, PUSH_STEPS, perturb
from experiments.envs.tasks import TASKS, make_env
from rewardmodels.errors import InvalidInput, UnknownName

ONSET = 7
MODEL = ("mass", "damping", "friction", "gravity", "strength", "dead_actuator")
INERT = {
    ("Swimmer", "damping"), ("Swimmer", "friction"), ("Swimmer", "gravity"),
    ("Reacher", "friction"), ("Reacher", "gravity"), ("InvertedPendulum", "friction"),
}  # fmt: skip
MUJOCO = sorted(n for n, task in TASKS.items() if "mujoco" in gym.spec(task.env_id).entry_point)


def std_of(env):
    return np.linspace(0.5, 2.0, env.observation_space.shape[0])


def pair(name, severity="middle", task="HalfCheetah", onset=ONSET, seed=0):
    bare, inner = make_env(TASKS[task]), make_env(TASKS[task])
    bare.action_space.seed(0)
    return bare, perturb(inner, name, severity, onset, seed, observation_std=std_of(inner))


def side_by_side(bare, env, steps, seed=1):
    """Observations `(steps + 1, n)` and rewards `(steps,)` of both, under the same actions."""
    seen, rewards = [[bare.reset(seed=seed)[0], env.reset(seed=seed)[0]]], []
    for _ in range(steps):
        action = bare.action_space.sample()
        one, two = bare.step(action), env.step(action)
        assert one[2:4] == two[2:4]
        seen.append([one[0], two[0]])
        rewards.append([one[1], two[1]])
    return *np.array(seen).swapaxes(0, 1), *np.array(rewards).T


@pytest.mark.parametrize(
    ("task", "name"), [both for both in product(MUJOCO, PERTURBATIONS) if both not in INERT]
)
def test_nothing_differs_before_the_onset_and_something_does_after(task, name):
    bare, env = pair(name, task=task)
    for seed in (1, 2):  # the second episode begins unperturbed again
        usual, seen, rewards, changed = side_by_side(bare, env, ONSET + 10, seed)
        np.testing.assert_array_equal(seen[: ONSET + 1], usual[: ONSET + 1])
        np.testing.assert_array_equal(changed[:ONSET], rewards[:ONSET])
        assert (seen[ONSET + 1 :] != usual[ONSET + 1 :]).any()
        assert seen.dtype == usual.dtype


def fields(model):
    arrays = {f: getattr(model, f) for f in dir(model) if not f.startswith("_")}
    arrays["gravity"] = model.opt.gravity
    return {f: np.array(a) for f, a in arrays.items() if isinstance(a, np.ndarray)}


# What MuJoCo derives from the masses.
DERIVED = {
    "body_subtreemass", "body_invweight0", "dof_invweight0", "dof_M0", "actuator_acc0",
    "tendon_invweight0",
}  # fmt: skip
EXPECTED = {
    "mass": {"body_mass": 2, "body_inertia": 2},
    "damping": {"dof_damping": 3},
    "friction": {"geom_friction": 0.3},
    "gravity": {"gravity": 1.5},
    "strength": {"actuator_gainprm": 0.5},
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("task", ["HalfCheetah", "Hopper", "Walker2d", "Ant"])
def test_the_named_fields_differ_by_the_factor_and_no_others(task, name):
    _, env = pair(name, task=task)
    before = fields(env.unwrapped.model)
    env.reset(seed=0)
    for _ in range(ONSET):
        env.step(np.zeros(env.action_space.shape))
    np.testing.assert_equal(fields(env.unwrapped.model), before)
    env.step(np.zeros(env.action_space.shape))
    assert env.steps == ONSET + 1
    after = fields(env.unwrapped.model)
    apart = {f for f in before if not np.array_equal(before[f], after[f], equal_nan=True)}
    assert apart - (DERIVED if name == "mass" else set()) == set(EXPECTED[name])
    for field, factor in EXPECTED[name].items():
        np.testing.assert_allclose(after[field], before[field] * factor)
    env.reset()
    np.testing.assert_equal(fields(env.unwrapped.model), before)


def test_what_mujoco_derives_from_masses_is_what_it_compiles_from_a_heavier_file():
    _, env = pair("mass", task="Hopper", onset=0)
    env.reset(seed=0)
    env.step(np.zeros(3))
    spec = mujoco.MjSpec.from_file(env.unwrapped.fullpath)
    for geom in spec.geoms:
        geom.density *= 2
    compiled = spec.compile()
    for field in ("body_mass", "body_inertia", *DERIVED):
        ours = getattr(env.unwrapped.model, field)
        np.testing.assert_allclose(ours, getattr(compiled, field), rtol=1e-6, err_msg=field)


def test_dead_actuators_are_drawn_in_each_episode_and_are_as_many_as_promised():
    for severity, ends in (("mild", [0.5] + 5 * [1]), ("middle", [0] + 5 * [1]),
                           ("severe", [0, 0, 1, 1, 1, 1])):  # fmt: skip
        _, env = pair("dead_actuator", severity)
        lost = set()
        for episode in range(12):
            env.reset(seed=episode)
            for _ in range(ONSET + 1):
                env.step(np.zeros(6))
            gain = env.unwrapped.model.actuator_gainprm[:, 0]
            assert sorted(gain) == ends
            lost.add(int(gain.argmin()))
        assert len(lost) > 1


def test_a_dead_actuator_ignores_its_action():
    _, env = pair("dead_actuator", onset=0)

    def end(change):
        env.reset(seed=3)
        for _ in range(5):
            action = np.full(6, 0.3)
            action[which] += change
            seen = env.step(action)[0]
        return seen

    which = slice(None)
    end(0)
    gain = env.unwrapped.model.actuator_gainprm[:, 0]
    dead = int(gain.argmin())
    which = dead
    np.testing.assert_array_equal(end(0), end(-0.6))
    which = (dead + 1) % 6
    assert (end(0) != end(-0.6)).any()


def test_noise_has_the_promised_spread_and_no_memory():
    bare, env = pair("noise", onset=0)
    usual, seen, *rewards = side_by_side(bare, env, 999)
    z = (seen - usual)[1:] / (0.3 * std_of(env))
    # 16,983 standard normal numbers: five standard errors about 0, 1 and no correlation.
    assert abs(z.mean()) < 5 / math.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(z.size)
    np.testing.assert_allclose(z.var(0), 1, atol=5 * math.sqrt(2 / len(z)))
    np.testing.assert_array_equal(*rewards)  # the agent is deceived, not the task


def test_a_bias_is_the_same_throughout_an_episode_and_has_either_sign():
    bare, env = pair("bias")
    errors = []
    for seed in (1, 2):
        usual, seen, *_ = side_by_side(bare, env, 30, seed)
        error = (seen - usual)[ONSET + 1 :] / std_of(env)
        np.testing.assert_allclose(error, np.broadcast_to(error[0], error.shape), atol=1e-12)
        np.testing.assert_allclose(abs(error), 0.5)
        assert {-1, 1} == set(np.sign(error[0]))
        errors.append(error[0])
    assert (errors[0] != errors[1]).any()


@pytest.mark.parametrize("onset", [0, ONSET])
@pytest.mark.parametrize(("severity", "count"), [("mild", 2), ("middle", 5), ("severe", 9)])
def test_a_frozen_sensor_keeps_its_last_value(severity, count, onset):
    bare, env = pair("frozen_sensor", severity, onset=onset)
    usual, seen, *_ = side_by_side(bare, env, 30)
    stuck = (seen[onset + 1 :] == usual[onset]).all(0)
    assert stuck.sum() == count
    np.testing.assert_array_equal(seen[:, ~stuck], usual[:, ~stuck])


@pytest.mark.parametrize("onset", [0, ONSET])
@pytest.mark.parametrize(("severity", "late"), [("mild", 1), ("middle", 3), ("severe", 6)])
def test_delayed_observations_are_those_of_some_steps_ago(severity, late, onset):
    bare, env = pair("delay", severity, onset=onset)
    usual, seen, *_ = side_by_side(bare, env, 30)
    for step in range(onset + 1, 31):
        np.testing.assert_array_equal(seen[step], usual[max(onset, step - late)])


def test_a_push_gives_the_whole_mass_its_speed_and_comes_again():
    _, env = pair("push", task="Ant")
    simulator = env.unwrapped
    mass = simulator.model.body_mass.sum()
    env.reset(seed=0)
    signs = set()
    for step in range(ONSET + 20 * PUSH_PERIOD):
        env.step(np.zeros(8))
        since = step - ONSET
        on = since >= 0 and since % PUSH_PERIOD < PUSH_STEPS
        force = simulator.data.xfrc_applied[1, 0]
        assert abs(force * PUSH_STEPS * simulator.dt / mass) == pytest.approx(0.5 if on else 0)
        assert np.count_nonzero(simulator.data.xfrc_applied) == int(on)
        signs.add(np.sign(force))
    assert signs == {-1, 0, 1}
    env.step(np.zeros(8))
    assert simulator.data.xfrc_applied.any()
    env.reset()
    assert not simulator.data.xfrc_applied.any()


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_randomness_follows_from_the_seeds(name):
    def seen(seed, episode):
        bare, env = pair(name, "middle", seed=seed)
        return side_by_side(bare, env, 40, episode)[1]

    np.testing.assert_array_equal(seen(0, 5), seen(0, 5))
    if name not in {*MODEL, "delay"} - {"dead_actuator"}:
        assert any((seen(0, 5) != seen(other, 5)).any() for other in (1, 2, 3))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_severities_are_graded(name):
    unchanged = 0 if PERTURBATIONS[name].unit.split()[0] != "times" else 1
    away = [abs(math.log(a) if unchanged else a) for a in PERTURBATIONS[name].amounts]
    assert 0 < away[0] < away[1] < away[2]


@pytest.mark.parametrize(
    ("task", "name", "argument"),
    [
        *((task, name, "name") for task, name in sorted(INERT)),
        *(("Pendulum", name, "env") for name in (*MODEL, "push")),  # isn't MuJoCo's
        ("InvertedPendulum", "dead_actuator", "severity"),  # has one actuator, two are to fail
    ],
)
def test_a_perturbation_that_a_task_cannot_have_is_refused(task, name, argument):
    with pytest.raises(InvalidInput, match=argument):
        pair(name, "severe", task=task)


def test_a_task_without_mujoco_can_have_perturbed_observations():
    bare, env = pair("delay", task="Pendulum")
    usual, seen, *_ = side_by_side(bare, env, 20)
    np.testing.assert_array_equal(seen[ONSET + 4 :], usual[ONSET + 1 : -3])
    assert seen.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"name": "masss"}, UnknownName, "name"),
        ({"severity": "middling"}, UnknownName, "severity"),
        ({"onset": -1}, InvalidInput, "onset"),
        ({"seed": -1}, InvalidInput, "seed"),
        ({"name": "noise"}, InvalidInput, "observation_std"),
        ({"name": "bias", "observation_std": np.ones(3)}, InvalidInput, "observation_std"),
        ({"name": "bias", "observation_std": np.zeros(17)}, InvalidInput, "observation_std"),
        ({"env": gym.make("FrozenLake-v1")}, InvalidInput, "env"),
    ],
)
def test_invalid_arguments_are_refused(change, error, argument):
    arguments = {"name": "mass", "severity": "middle", "onset": 3, "seed": 0}
    env = change.pop("env", None) or make_env(TASKS["HalfCheetah"])
    with pytest.raises(error, match=argument):
        perturb(env, **(arguments | change))


def test_one_perturbation_at_a_time():
    _, env = pair("mass")
    with pytest.raises(InvalidInput, match="env"):
        perturb(gym.wrappers.TimeLimit(env, 5), "gravity", "mild", 0, 0)
