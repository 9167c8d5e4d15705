"""Local data: a file holds what environments did, levels are chosen by what policies score, training is done once."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from experiments import files
from experiments.decision import collect as made
from experiments.decision import data
from experiments.decision.collect import policies, training
from experiments.launch import command
from experiments.seeds import QUARTER
from scripts import collect

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

ROOT = Path(__file__).parent.parent
SMALL = training.Recipe(44.3, "PPO", 2048, 2, {"n_steps": 128, "batch_size": 128, "learning_rate": 1e-3}, checkpoints=4)

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        command(collect.main, [*map(str, arguments)], refusals=(OSError,))
    return ended.value.code or 0, "".join(capsys.readouterr())


def load(path):
    with h5py.File(path) as file:
        return {key: file[key][()] for key in data.KEYS}


def first_episode(rows):
    end = np.flatnonzero(rows["terminals"] | rows["timeouts"])[0] + 1
    return {key: rows[key][:end] for key in rows}


def replayed(env, seed, episode):
    """What an environment does that begins with a seed and is given an episode's actions."""
    environment = gymnasium.make(data.ENVIRONMENTS[env].id)
    observation, rows = environment.reset(seed=seed)[0], []
    for action in episode["actions"]:
        next_observation, reward, terminated, truncated, _ = environment.step(action)
        rows.append((observation, action, reward, terminated, truncated and not terminated, next_observation))
        observation = next_observation
    return {
        key: np.array(column, episode[key].dtype)
        for key, column in zip(data.KEYS, zip(*rows, strict=True), strict=True)
    }


def assert_same(rows, expected):
    for key in data.KEYS:
        np.testing.assert_array_equal(rows[key], expected[key], err_msg=key)


# -- the command


def test_random_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "scripts.collect", "env=hopper", "level=random", f"folder={tmp_path}", "seed=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    path = tmp_path / "local" / "hopper-random.hdf5"
    assert done.returncode == 0 and done.stdout.startswith(f"{path}: 5,0") and done.stderr == "", done
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    dataset = data.read(path, "local/hopper-medium")
    rows = load(path)
    for key, array in rows.items():
        assert array.dtype == (bool if key in ("terminals", "timeouts") else np.float32), key
    assert 5000 <= len(rows["rewards"]) == dataset.starts[-1] < 6000  # whole episodes only
    assert not (rows["terminals"] & rows["timeouts"]).any()
    assert np.abs(rows["actions"]).max() <= 1 and np.abs(rows["actions"].std(0) - 3**-0.5).max() < 0.02
    episode = first_episode(rows)
    seed = int(policies.generator(3, "random").integers(QUARTER, size=policies.BATCH)[0])
    assert_same(episode, replayed("hopper", seed, episode))

    facts = dataset.metadata
    assert facts["source"].startswith("local") and facts["environment"] == "Hopper-v4" and facts["seed"] == 3
    assert facts["rows"] == len(rows["rewards"]) and facts["episodes"] == dataset.episodes
    scores = data.normalized("hopper", dataset.returns)
    assert facts["score"] == pytest.approx({"mean": scores.mean(), "std": scores.std(), "n": len(scores)}, rel=1e-6)
    assert {"gymnasium", "mujoco", "torch"} < set(facts["versions"])
    with h5py.File(path) as file:
        assert file["observations"].compression == "gzip"


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "local" / "hopper-random.hdf5"
    arguments = ("env=hopper", "level=random", "steps=100", f"folder={tmp_path}")
    assert call(capsys, *arguments)[0] == 0
    rows, content = load(path), path.read_bytes()
    code, said = call(capsys, *arguments, "seed=1")
    assert code == 0 and f"{path}: is there already" in said and path.read_bytes() == content
    path.unlink()
    assert call(capsys, *arguments)[0] == 0
    assert_same(load(path), rows)  # the same seed gives the same rows
    path.unlink()
    assert call(capsys, *arguments, "seed=1")[0] == 0
    assert not np.array_equal(load(path)["rewards"][:20], rows["rewards"][:20])


def test_the_folder_is_where_experiments_look(tmp_path, monkeypatch):
    monkeypatch.delenv("MINRNN_DATA", raising=False)
    assert collect.parse(["env=hopper", "level=all"]).folder == Path("data")
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path))
    assert collect.parse(["env=hopper", "level=all"]).folder == tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["env=hoper", "level=all"], "env: expected one of .*, got 'hoper'; the nearest is hopper"),
        (
            ["env=hopper", "level=medium_replay"],
            "level: expected .*, got 'medium_replay'; the nearest is medium-replay",
        ),
        (["env=hopper"], "level: expected one of .*, got ''$"),
        (["env=hopper", "level=all", "sede=1"], "sede=1: no such setting; the nearest is seed="),
        (["env=hopper", "level=all", "seed=-1"], "seed: expected 0 to 2047, got -1"),
        (["env=hopper", "level=all", "steps=1e5"], "steps: expected int, got '1e5'"),
        (["hopper"], "expected key=value of env, .*, got 'hopper'"),
        (["env=hopper", "level=medium-replay", "steps=9"], "steps: expected none for medium-replay"),
    ],
)
def test_a_wrong_command_says_what_was_expected(arguments, said, capsys):
    with pytest.raises(ValueError, match=said):
        collect.parse(arguments)
    code, output = call(capsys, *arguments)
    assert code == 2 and output.startswith("error: ")


def test_a_folder_that_cannot_be_written_is_said_before_the_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").write_text("")
    monkeypatch.setattr(made, "trained", lambda *_: pytest.fail("trained"))
    code, said = call(capsys, "env=hopper", "level=all", f"folder={tmp_path}/data")
    assert code == 1 and said.startswith("error: ") and f"{tmp_path}/data" in said


def test_what_experiments_cannot_read_gets_no_name(tmp_path):
    (episode,) = policies.play("hopper", policies.uniform("hopper"), 1, np.random.default_rng(0))
    episode["rewards"][2] = np.nan
    with pytest.raises(data.DataError, match="rewards"):
        made.write(tmp_path / "hopper-medium.hdf5", "hopper", [episode], {})
    assert list(tmp_path.iterdir()) == []


# -- episodes


def test_a_truncated_episode_is_not_terminated():
    episodes = policies.play("halfcheetah", policies.uniform("halfcheetah"), 2, np.random.default_rng(0))
    for episode in episodes:
        assert len(episode["rewards"]) == 1000 and not episode["terminals"].any()
        assert episode["timeouts"].tolist() == [False] * 999 + [True]
    seeds = np.random.default_rng(0).integers(QUARTER, size=2)
    for seed, episode in zip(seeds, episodes, strict=True):
        assert_same(episode, replayed("halfcheetah", int(seed), episode))


def in_jaxs_layout(model):
    """What sbx, which need not be installed, would have of stable_baselines3's SAC."""
    hidden = [layer for layer in model.actor.latent_pi if isinstance(layer, torch.nn.Linear)]
    layers = enumerate([*hidden, model.actor.mu, model.actor.log_std])
    dense = {f"Dense_{i}": {"kernel": x.weight.detach().numpy().T, "bias": x.bias.detach().numpy()} for i, x in layers}
    policy = SimpleNamespace(actor_state=SimpleNamespace(params={"params": dense}))
    return SimpleNamespace(get_vec_normalize_env=lambda: None, policy=policy)


def test_a_policy_is_sbxs():
    sbx = pytest.importorskip("sbx", reason="sbx-rl is not installed")
    model = sbx.TQC("MlpPolicy", "Hopper-v4", seed=0, learning_starts=20, policy_kwargs={"net_arch": [32, 16]})
    model.learn(40)
    policy, observations = policies.Policy.of(model), np.random.default_rng(0).normal(0, 3, (50, 11)).astype(np.float32)
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_allclose(policy(observations, None), expected, atol=1e-5)
    law = model.policy.actor.apply(model.policy.actor_state.params, observations[:1]).distribution
    a = policy.arrays
    hidden = np.maximum(np.maximum(observations[:1] @ a["weight0"].T + a["bias0"], 0) @ a["weight1"].T + a["bias1"], 0)
    log_std = np.minimum(hidden @ a["weight_std"].T + a["bias_std"], 2)
    np.testing.assert_allclose(np.exp(log_std), law.stddev(), rtol=1e-4)


def test_a_learner_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sbx", None)
    with pytest.raises(training.CollectError, match="sbx-rl, which is not installed .*pip install sbx-rl"):
        training.learner_class("TQC")


@pytest.mark.parametrize("learner", ["PPO", "SAC"])
def test_a_policy_is_its_learners(learner):
    envs = DummyVecEnv([lambda: gymnasium.make("Hopper-v4")])
    if learner == "PPO":
        envs = VecNormalize(envs)
    settings = {"PPO": {"n_steps": 64, "learning_rate": 0.02}, "SAC": {"learning_starts": 20, "learning_rate": 0.02}}
    model = getattr(stable_baselines3, learner)("MlpPolicy", envs, seed=0, device="cpu", **settings[learner])
    model.learn(128)
    policy = policies.Policy.of(model if learner == "PPO" else in_jaxs_layout(model))
    observations = np.random.default_rng(0).normal(0, 3, (50, 11))
    given = envs.normalize_obs(observations) if learner == "PPO" else observations
    expected = model.predict(given, deterministic=True)[0]
    np.testing.assert_allclose(policy(observations, None), expected, atol=1e-5)
    assert np.std(expected, 0).min() > 0.02  # it does look at what is observed

    rng, one = np.random.default_rng(0), torch.as_tensor(given[:1], dtype=torch.float32)
    actions = policy(np.repeat(observations[:1], 20_000, 0), rng)
    with torch.no_grad():
        if learner == "PPO":
            law = model.policy.get_distribution(one).distribution
            expected = torch.distributions.Normal(law.mean[0], law.stddev[0]).sample((20_000,)).clamp(-1, 1).numpy()
        else:
            expected = np.concatenate([model.actor(one.expand(20_000, -1))])
    assert actions.dtype == np.float32
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        np.testing.assert_allclose(np.quantile(actions, q, 0), np.quantile(expected, q, 0), atol=0.05)
    assert expected.std(0).min() > 0.3


# -- levels


def test_medium_is_the_first_that_is_near():
    #         0  1   2   3   4   5   6
    quick_scores = [5, 20, 38, 52, 45, 80, 44]
    truth = [5, 22, 33, 47, 44, 85, 44]
    asked = []

    def look(i):
        asked.append(i)
        return truth[i]

    assert training.choose(quick_scores, look, 44) == (3, 5)
    assert asked[:2] == [2, 3] and len(set(asked)) == len(asked)


def test_without_any_that_is_near_it_is_the_nearest():
    truth = [5, 30, 70, 90]
    assert training.choose(truth, truth.__getitem__, 44) == (1, 3)
    assert training.choose([7.0], [7.0].__getitem__, 44) == (0, 0)


def test_the_best_quick_score_may_be_luck():
    quick_scores = [10, 44, 70, 99, 85, 83]
    truth = [10, 44, 70, 40, 82, 88]
    assert training.choose(quick_scores, truth.__getitem__, 44) == (1, 5)


def test_a_long_log_is_thinned_by_whole_episodes_evenly():
    random = np.random.default_rng(0)
    episodes = [{"rewards": np.full(n, i)} for i, n in enumerate(random.integers(10, 1000, 2000))]
    rows = sum(len(episode["rewards"]) for episode in episodes)
    kept = training.thin(episodes, rows // 4)
    numbers = np.array([episode["rewards"][0] for episode in kept])
    assert abs(len(kept) - 500) <= 1 and set(np.diff(numbers)) <= {3, 4, 5}
    assert sum(len(episode["rewards"]) for episode in kept) == pytest.approx(rows / 4, rel=0.05)
    assert training.thin(episodes, rows) == episodes == training.thin(episodes, 10 * rows)


# -- training


@pytest.fixture
def small(tmp_path, monkeypatch, capsys):
    """Calls the command with a training of seconds."""
    monkeypatch.setitem(training.RECIPES, "hopper", SMALL)
    for name, value in {"SCREEN": 2, "LOOK": 3, "CANDIDATES": 2, "BATCH": 4}.items():
        monkeypatch.setattr(policies if name == "BATCH" else training, name, value)

    def command(*arguments):
        places = (f"folder={tmp_path}/data", f"output_dir={tmp_path}/outputs")
        return call(capsys, "env=hopper", *places, *arguments)

    return command


def test_one_training_gives_three_levels(small, tmp_path, monkeypatch):
    code, said = small("level=all", "steps=300")
    assert code == 0, said
    paths = {level: tmp_path / "data" / "local" / f"hopper-{level}.hdf5" for level in data.LEVELS}
    sets = {level: data.read(path, f"local/hopper-{level}") for level, path in paths.items()}
    rows = {level: load(path) for level, path in paths.items()}
    for level in data.LEVELS:
        assert sets[level].starts[-1] == len(rows[level]["rewards"])
        assert f"{paths[level]}: {len(rows[level]['rewards']):,} rows" in said
    assert "the medium policy's score is" in said and "; expected 44.3" in said  # so short a training is not enough

    # medium-expert: medium's rows, then as many of the other policy
    count = len(rows["medium"]["rewards"])
    assert 300 <= count < 1300 and 300 <= len(rows["medium-expert"]["rewards"]) - count < 1300
    assert_same({key: array[:count] for key, array in rows["medium-expert"].items()}, rows["medium"])

    # medium-replay: what the first environment really did, given the learner's actions; neither is normalised
    episodes = training._split(rows["medium-replay"])
    replays = [replayed("hopper", 0, episode) for episode in episodes]
    assert any(all(np.array_equal(a[key], b[key]) for key in data.KEYS) for a, b in zip(episodes, replays, strict=True))
    facts = sets["medium-replay"].metadata
    assert facts["learner"] == "stable-baselines3 PPO" and facts["training_steps"] == 2048
    assert len(rows["medium-replay"]["rewards"]) <= facts["policies"]["medium"]["step"] <= 2048
    assert np.abs(rows["medium-replay"]["actions"]).max() == 1
    assert facts["policies"]["expert"]["score"]["n"] == 3 and facts["policies"]["medium"]["score_of_mean_action"]

    # A level alone is made of the same training, the same again.
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    for path in paths.values():
        path.unlink()
    for level in ("medium-expert", "medium-replay"):
        code, said = small(f"level={level}", *(["steps=300"] if level == "medium-expert" else []))
        assert code == 0, said
        assert_same(load(paths[level]), rows[level])
    assert not paths["medium"].exists()


def test_a_training_of_other_settings_is_not_taken(small, tmp_path, monkeypatch):
    folder = tmp_path / "outputs" / "collect" / "hopper-0"
    assert small("level=medium", "steps=50")[0] == 0
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
        *("expert.npz", "log.npz", "medium.npz", "training.json")
    ]
    monkeypatch.setitem(training.RECIPES, "hopper", training.Recipe(50, *list(vars(SMALL).values())[1:]))
    code, said = small("level=medium-replay")
    assert code == 1 and f"error: {folder}: was trained with other recipe" in said and "remove it" in said
    monkeypatch.setitem(training.RECIPES, "hopper", SMALL)
    (folder / "log.npz").write_bytes((folder / "log.npz").read_bytes()[:1000])
    code, said = small("level=medium-replay")
    assert code == 1 and f"error: {folder}: cannot be read" in said
    (folder / "training.json").unlink()  # as a kill before the end leaves it
    assert small("level=medium-replay")[0] == 0


def test_two_do_not_train_at_once(small, tmp_path):
    with files.claim(tmp_path / "outputs" / "collect" / "hopper-0") as free:
        assert free
        code, said = small("level=medium")
    assert code == 1 and "another process trains there" in said
