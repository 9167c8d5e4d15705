"""Offline data of locomotion: episodes as the file marks them, refusals by name, windows against plain loops."""

import json
import math
import os
import warnings
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from experiments import data as files
from experiments.data import DataError
from experiments.decision import data
from scripts.planner import datasets

NAME = "local/hopper-medium"


def steps(lengths, tail=0, sizes=(11, 3), seed=0):
    """A file's arrays: episodes end by terminals and timeouts in turn, the rows of the tail do not end."""
    random = np.random.default_rng(seed)
    n = sum(lengths) + tail
    observations = random.normal(2, 3, (n + 1, sizes[0])).astype(np.float32)
    arrays = {
        "observations": observations[:-1],
        "actions": random.uniform(-1, 1, (n, sizes[1])).astype(np.float32),
        "rewards": random.normal(1, 2, n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
        "next_observations": observations[1:].copy(),
    }
    for i, last in enumerate(np.cumsum(lengths) - 1):
        arrays[("terminals", "timeouts")[i % 2]][last] = True
        arrays["next_observations"][last] = random.normal(size=sizes[0])  # the next episode begins elsewhere
    return arrays


def save(path, arrays, metadata=()):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip" if np.ndim(value) else None)
        for key, value in dict(metadata).items():
            file[f"metadata/{key}"] = value
    return path


def split(arrays):
    """Row numbers of each episode, by a plain loop."""
    episodes, rows = [], []
    for i in range(len(arrays["rewards"])):
        rows.append(i)
        timeout = arrays["timeouts"][i] if "timeouts" in arrays else len(rows) == 1000
        if arrays["terminals"][i] or timeout:
            episodes.append(rows)
            rows = []
    return episodes


@pytest.fixture
def dataset(tmp_path):
    return data.read(save(tmp_path / "a.hdf5", steps((3, 1, 9, 7), tail=2)), NAME)


@pytest.mark.parametrize("env", data.ENVIRONMENTS)
@pytest.mark.parametrize("lengths, tail", (((3, 1, 4, 4), 2), ((5,), 0), ((1,), 1), ((1000, 2), 0)))
def test_episodes_end_where_the_file_says(tmp_path, env, lengths, tail):
    arrays = steps(lengths, tail, data.ENVIRONMENTS[env].sizes)
    path = save(tmp_path / "a.hdf5", arrays)
    found = data.read(path, f"d4rl/{env}-medium-replay")
    episodes = split(arrays)
    assert [len(rows) for rows in episodes] == list(lengths)
    assert found.episodes == len(lengths) and found.starts.dtype == np.int64
    assert found.starts.tolist() == [rows[0] for rows in episodes] + [sum(lengths)]
    for key in ("observations", "actions", "rewards", "terminals"):
        value = getattr(found, key)
        assert value.dtype == arrays[key].dtype and np.array_equal(value, arrays[key][: sum(lengths)])
    returns = [math.fsum(arrays["rewards"][i] for i in rows) for rows in episodes]
    assert found.returns == pytest.approx(returns, rel=1e-12) and found.returns.dtype == np.float64
    kept = arrays["observations"][: sum(lengths)].astype(np.float64)
    np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, kept.std(0) + 1e-6, rtol=1e-6)
    assert found.mean.dtype == found.std.dtype == np.float32
    assert (found.name, found.env) == (f"d4rl/{env}-medium-replay", env)
    assert found.metadata == {}


def test_without_timeouts_an_episode_also_ends_at_its_1000th_step(tmp_path):
    arrays = steps((3, 2403, 1000, 1200, 30), tail=0)
    arrays["terminals"][[2, 2405, 3405]], arrays["terminals"][-1] = True, False
    del arrays["timeouts"], arrays["next_observations"]
    found = data.read(save(tmp_path / "a.hdf5", arrays), NAME)
    assert np.diff(found.starts).tolist() == [3, 1000, 1000, 403, 1000, 1000] == [len(rows) for rows in split(arrays)]


def test_other_layouts_that_d4rl_reads_are_read(tmp_path):
    arrays = steps((3, 4), tail=1)
    other = arrays | {key: arrays[key][:, None].astype(np.float64) for key in ("rewards", "terminals", "timeouts")}
    other["observations"] = arrays["observations"].astype(np.float64)
    a, b = (data.read(save(tmp_path / name, each), NAME) for name, each in (("a", arrays), ("b", other)))
    for key in ("observations", "actions", "rewards", "terminals", "starts"):
        assert getattr(a, key).dtype == getattr(b, key).dtype and np.array_equal(getattr(a, key), getattr(b, key))


def test_metadata_is_json(tmp_path):
    metadata = {
        "algorithm": np.bytes_("SAC"), "note": "é", "iteration": np.int32(7), "score": np.float32(0.5),
        "nan": float("nan"), "scores": np.array([1.5, 2.5]), "policy/fc0/weight": np.zeros((32, 11), np.float32),
    }  # fmt: skip
    path = save(tmp_path / "a.hdf5", steps((3,)), metadata)
    with h5py.File(path, "a") as file:
        file["metadata"].attrs["mujoco"] = "4.0.0"
    found = data.read(path, NAME).metadata
    assert found == json.loads(json.dumps(found, allow_nan=False)) == {
        "algorithm": "SAC", "note": "é", "iteration": 7, "score": 0.5, "nan": "nan", "scores": [1.5, 2.5],
        "policy": {"fc0": {"weight": "float32 (32, 11)"}}, "mujoco": "4.0.0",
    }  # fmt: skip


def put(key, place, value):
    def change(arrays):
        if key == "terminals":
            arrays[key] = arrays[key].astype(np.float32)
        arrays[key][place] = value

    return change


def without(*keys):
    return lambda arrays: [arrays.pop(key) for key in keys]


def replaced(key, function):
    return lambda arrays: arrays.update({key: function(arrays[key])})


@pytest.mark.parametrize(
    "change, words",
    (
        (without("rewards", "terminals"), "there is no rewards, terminals, only .'actions', 'next_observations'"),
        (without("observations"), "expected observations, actions, rewards, terminals; there is no observations"),
        (replaced("observations", lambda x: x[:, :-1]), r"observations: .* shape \(10, 11\), .* Hopper-v4, got .*10\)"),
        (replaced("observations", lambda x: 3.0), r"observations: expected numbers of shape .* shape \(\)"),
        (replaced("actions", lambda x: np.tile(x, 2)), r"actions: .* shape \(10, 3\), .* shape \(10, 6\)"),
        (replaced("actions", lambda x: x[:-1]), r"actions: .* shape \(10, 3\), 10 rows .* shape \(9, 3\)"),
        (replaced("rewards", lambda x: x[:-1]), r"rewards: .* shape \(10,\), .* shape \(9,\)"),
        (replaced("rewards", lambda x: np.tile(x[:, None], 2)), r"rewards: .* shape \(10,\), .* shape \(10, 2\)"),
        (replaced("rewards", lambda x: x.astype("S5")), r"rewards: expected numbers of .*, got \|S5 of"),
        (replaced("timeouts", lambda x: np.append(x, True)), r"timeouts: .* shape \(10,\), .* shape \(11,\)"),
        (replaced("next_observations", lambda x: x[1:]), r"next_observations: .* shape \(10, 11\), .* \(9, 11\)"),
        (put("observations", (4, 5), np.nan), "observations: expected finite numbers, 1 are not, the first in row 4"),
        (put("actions", slice(6, 8), np.inf), "actions: expected finite numbers, 6 are not, the first in row 6"),
        (put("rewards", -1, -np.inf), "rewards: expected finite numbers, 1 are not, the first in row 9"),
        (put("next_observations", (0, 0), np.nan), "next_observations: expected finite numbers"),
        (replaced("rewards", lambda x: x * 1e300), "rewards: expected finite numbers"),
        (put("terminals", 5, 0.5), r"terminals: expected 0 or 1, got 0.5 in row 5 \(1 such rows\)"),
        (put("terminals", slice(3, 5), np.nan), r"terminals: expected 0 or 1, got nan in row 3 \(2 such rows\)"),
        (lambda a: a.update(terminals=~np.ones(10, bool), timeouts=~np.ones(10, bool)), "none of the 10 rows ends one"),
        (lambda a: a.update({key: value[:0] for key, value in a.items()}), "none of the 0 rows ends one"),
    ),
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, words):
    arrays = steps((4, 4), tail=2)
    change(arrays)
    path = save(tmp_path / "a.hdf5", arrays)
    with np.errstate(all="raise"), pytest.raises(DataError, match=f"^{path}: .*{words}"):
        data.read(path, NAME)


@pytest.mark.parametrize(
    "change, words",
    (
        (put("next_observations", [0, 5, 6], 0), "3 of 6 rows differ, the first is row 0"),
        (replaced("next_observations", lambda x: np.roll(x, 1, 0)), "6 of 6 rows differ, the first is row 0"),
    ),
)
def test_next_observations_that_disagree_are_pointed_out(tmp_path, change, words):
    arrays = steps((4, 4), tail=2)
    expected = data.read(save(tmp_path / "a.hdf5", arrays), NAME)
    change(arrays)
    path = save(tmp_path / "b.hdf5", arrays)
    with pytest.warns(UserWarning, match=f"^{path}: next_observations: .* {words}"):
        assert data.read(path, NAME).sha256 == expected.sha256


def test_a_long_episode_is_pointed_out_and_kept(tmp_path):
    """Its timesteps stop at 999, as those of Decision Transformer's get_batch do."""
    path = save(tmp_path / "a.hdf5", steps((4, 1003, 3, 1001)))
    with pytest.warns(UserWarning, match=f"^{path}: .* 2 are longer, the first has 1003 from row 4"):
        found = data.read(path, NAME)
    assert np.diff(found.starts).tolist() == [4, 1003, 3, 1001]
    timesteps = data.Windows(found, 5, "cpu").timesteps.tolist()
    assert timesteps == [*range(4), *range(1000), 999, 999, 999, *range(3), *range(1000), 999]


def test_next_observations_may_be_rounded_and_end_elsewhere(tmp_path):
    arrays = steps((40, 1, 40), tail=5)
    after = arrays["next_observations"].astype(np.float64)
    arrays["next_observations"] = after * (1 + np.random.default_rng(0).uniform(-5e-8, 5e-8, after.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.read(save(tmp_path / "a.hdf5", arrays), NAME)
    arrays["next_observations"][0, 3] = after[0, 3] * (1 + 1e-6)
    with pytest.warns(UserWarning, match="1 of 78 rows differ, the first is row 0"):
        data.read(save(tmp_path / "a.hdf5", arrays), NAME)


def test_the_checksum_is_the_arrays(tmp_path):
    """Whatever else a file holds and however it holds them; any bit of any of them changes it."""
    arrays = steps((3, 4), tail=1)
    first = data.dataset_checksum(save(tmp_path / "a.hdf5", arrays, {"seconds": 3.5}), NAME)
    assert len(first) == 64 and first == data.read(tmp_path / "a.hdf5", NAME).sha256
    other = arrays | {"rewards": arrays["rewards"][:, None].astype(np.float64)}
    del other["next_observations"]
    path = save(tmp_path / "b.hdf5", other, {"seconds": 4.5, "started": "today"})
    assert path.read_bytes() != (tmp_path / "a.hdf5").read_bytes() and data.dataset_checksum(path, NAME) == first
    found = [first]
    for key, row in (("observations", 6), ("actions", 2), ("rewards", 0), ("terminals", 6), ("timeouts", 4)):
        changed = {name: value.copy() for name, value in other.items()}
        changed[key][row] = ~changed[key][row] if key in ("terminals", "timeouts") else np.nextafter(
            changed[key][row].astype(np.float32), np.float32(9)
        )  # fmt: skip
        found.append(data.dataset_checksum(save(tmp_path / "c.hdf5", changed), NAME))
    assert len({*found}) == 6
    a = np.arange(6, dtype=np.int64)
    different = [(a,), (a.reshape(2, 3),), (a.astype(np.int32),), (a, a), (a[:3], a[3:]), (a[3:], a[:3])]
    assert len({data.checksum(*each) for each in different}) == 6
    assert data.checksum(a.reshape(2, 3).T) == data.checksum(a.reshape(2, 3).T.copy())
    assert data.checksum(a.astype(">i8")) == data.checksum(a)


def test_what_is_no_whole_hdf5_file_is_refused(tmp_path):
    path = save(tmp_path / "a.hdf5", steps((300, 300)))
    content = path.read_bytes()
    for size in (0, 5, 100, 600, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=f"^{path}: expected a whole HDF5 file, got what cannot be read"):
            data.read(path, NAME)
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match="expected a whole HDF5 file"):
        data.read(path, NAME)
    path.unlink()
    with pytest.raises(DataError, match="expected a whole HDF5 file, got what cannot be read .*No such file"):
        data.read(path, NAME)


def minari(path, lengths, change=lambda file: None, sizes=(11, 3)):
    """A file as Minari 0.5.4 writes it, an episode of each length, and the episodes; even ones end by themselves."""
    random, episodes = np.random.default_rng(0), []
    with h5py.File(path, "w") as file:
        for i, n in enumerate(lengths):
            group = file.create_group(f"episode_{i}")
            group.attrs.update({"id": i, "seed": i, "total_steps": n})
            episode = {
                "observations": random.normal(2, 3, (n + 1, sizes[0])),
                "actions": random.uniform(-1, 1, (n, sizes[1])).astype(np.float32),
                "rewards": random.normal(1, 2, n),
                "terminations": np.arange(n) == (n - 1 if i % 2 == 0 else -1),
                "truncations": np.arange(n) == (n - 1 if i % 2 == 1 else -1),
            }
            for key, value in episode.items():
                group.create_dataset(key, data=value, chunks=True, maxshape=(None, *value.shape[1:]))
            group["infos/x_position"] = np.zeros(n + 1)
            episodes.append(episode)
        change(file)
    return episodes


@pytest.mark.parametrize("env", data.ENVIRONMENTS)
def test_minaris_episodes_are_read_in_the_order_of_their_numbers(tmp_path, env):
    lengths = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 7, 8, 1000)  # of 13, so that HDF5 lists 10 before 2
    path = tmp_path / "a.hdf5"
    episodes = minari(path, lengths, sizes=data.ENVIRONMENTS[env].sizes)
    found = data.read(path, f"minari/{env}-medium")
    assert (found.name, found.env, found.metadata) == (f"minari/{env}-medium", env, {})
    assert found.episodes == len(lengths) and found.starts.dtype == np.int64
    for i, episode in enumerate(episodes):
        rows = slice(found.starts[i], found.starts[i + 1])
        assert np.array_equal(found.observations[rows], episode["observations"][:-1].astype(np.float32))
        assert np.array_equal(found.actions[rows], episode["actions"])
        assert np.array_equal(found.rewards[rows], episode["rewards"].astype(np.float32))
        assert found.terminals[rows].tolist() == [i % 2 == 0 and t == lengths[i] - 1 for t in range(lengths[i])]
    assert found.observations.dtype == found.rewards.dtype == np.float32 and found.terminals.dtype == bool


def other(name, value, inner=""):
    def change(file):
        del file[name]
        if value is not None:
            file[f"{name}/{inner}".rstrip("/")] = value

    return change


SHAPES = r"expected observations, .* \(T \+ 1, 11\), \(T, 3\), \(T,\), \(T,\) and \(T,\), got "


@pytest.mark.parametrize(
    "change, words",
    (
        (other("episode_1", None), "no episode_1 among 2, .'episode_0', 'episode_2'"),
        (other("episode_2", np.zeros(3)), "there is no episode_2 among 3"),
        (lambda file: file.create_group("metadata"), "there is no episode_3 among 4"),
        (lambda file: file.clear(), r"there is no episode_0 among 0, \[\]"),
        (other("episode_1/rewards", None), f"episode_1: {SHAPES}.*, None, "),
        (other("episode_1/rewards", np.zeros((4, 1))), rf"episode_1: {SHAPES}.*, \(4, 1\), "),
        (other("episode_0/observations", np.zeros((5, 17))), rf"episode_0: {SHAPES}\(5, 17\), \(4, 3\)"),
        (other("episode_0/observations", np.zeros((4, 11))), rf"episode_0: {SHAPES}\(4, 11\), \(4, 3\)"),
        (other("episode_0/observations", 1.0), rf"episode_0: {SHAPES}\(\), \(4, 3\)"),
        (other("episode_0/actions", np.zeros((4, 6))), rf"episode_0: {SHAPES}\(5, 11\), \(4, 6\)"),
        (
            other("episode_2/observations", np.zeros((5, 11)), "goal"),
            "episode_2: .*, got <HDF5 group .*observations.*1 members",
        ),
        (other("episode_1/truncations", np.zeros(4, bool)), r"episode_1: .* the last of its 4 steps .* at \[\]"),
        (other("episode_2/terminations", np.arange(4) > 1), r"episode_2: .* and no other, got marks at \[2, 3\]"),
        (other("episode_2/terminations", np.arange(4) / 3), r"episode_2: .* got marks at \[1, 2, 3\]"),
        (other("episode_1/truncations", np.arange(4) // 3 * 2), "timeouts: expected 0 or 1, got 2 in row 7"),
        (other("episode_1/rewards", np.full(4, np.nan)), "rewards: expected finite numbers, 4 are not, .* row 4"),
        (other("episode_1/rewards", np.full(4, b"x")), "rewards: expected numbers of shape"),
    ),
)
def test_what_is_not_minaris_is_refused_by_name(tmp_path, change, words):
    path = tmp_path / "a.hdf5"
    minari(path, (4, 4, 4), change)
    with pytest.raises(DataError, match=f"^{path}: (?!expected a whole HDF5 file).*{words}"):
        data.read(path, "minari/hopper-expert")


def test_minaris_lengths_are_checked_and_its_files_are_not_others(tmp_path):
    path = tmp_path / "a.hdf5"
    minari(path, (4, 0, 3))
    with pytest.raises(
        DataError, match=r"episode_1: expected .* to mark the last of its 0 steps and no other, got .*\[\]"
    ):
        data.read(path, "minari/hopper-expert")
    minari(path, (4, 1001, 3))
    with pytest.warns(UserWarning, match="episodes of 1000 steps at most, 1 are longer, the first has 1001 from row 4"):
        assert data.read(path, "minari/hopper-expert").episodes == 3
    with pytest.raises(DataError, match="expected observations, actions, .* there is no observations, "):
        data.read(path, NAME)
    with pytest.raises(DataError, match="expected Minari's groups .* no episode_0 among 6, .'actions', 'next_obs"):
        data.read(save(path, steps((3, 4))), "minari/hopper-expert")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="expected a whole HDF5 file, got what cannot be read"):
        data.read(path, "minari/hopper-expert")


def test_scores_are_those_published():
    references = {"hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0), "walker2d": (1.629008, 4592.3)}
    assert {env: environment.reference for env, environment in data.ENVIRONMENTS.items()} == references
    # Decision Transformer's targets as normalised scores
    pairs = {"hopper": (111.24, 55.93), "halfcheetah": (98.91, 50.58), "walker2d": (108.88, 54.42)}
    for env, scores in pairs.items():
        assert [round(data.normalized(env, target), 2) for target in data.ENVIRONMENTS[env].targets] == list(scores)
        assert [data.normalized(env, x) for x in data.ENVIRONMENTS[env].reference] == [0, 100]


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")  # v4 is what compares with D4RL
def test_environments_are_of_the_sizes_said():
    for environment in data.ENVIRONMENTS.values():
        env = gymnasium.make(environment.id)
        assert environment.sizes == (env.observation_space.shape[0], env.action_space.shape[0])
        assert env.spec.max_episode_steps == data.MAX_EP_LEN
        env.close()


def test_names_of_sets():
    assert data.split_name("local/hopper-medium-replay") == ("local", "hopper", "medium-replay")
    assert data.split_name("d4rl/walker2d-medium") == ("d4rl", "walker2d", "medium")
    assert data.split_name("minari/halfcheetah-simple") == ("minari", "halfcheetah", "simple")
    d4rl = {f"d4rl/{env}-{level}" for env in data.ENVIRONMENTS for level in data.LEVELS}
    assert d4rl == {*files.D4RL} and {data.split_name(name)[0] for name in d4rl} == {"d4rl"}
    assert files.D4RL["d4rl/walker2d-medium-expert"].url == (
        "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/walker2d_medium_expert-v2.hdf5"
    )
    for name, nearest in (
        ("local/hoper-medium", "local/hopper-medium"),
        ("hopper-medium-replay", "d4rl/hopper-medium-replay"),
        ("d4rl/halfcheetah_medium_expert-v2", "d4rl/halfcheetah-medium-expert"),
        ("minari/hopper-medium-v0", "minari/hopper-medium"),
        ("minari/hopper-medium-expert", "minari/hopper-medium"),
        ("mujoco/hopper/simple-v0", "minari/hopper-simple"),
        ("", ""),
    ):
        with pytest.raises(ValueError, match=f"data.dataset: expected .*, got '{name}'; the nearest is '{nearest}"):
            data.split_name(name)


def test_local_files_are_found_or_said_how_to_make(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FOLDER", tmp_path / "data")
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as error:
        data.find("local/hopper-medium-replay")
    assert str(error.value) == (
        f"local/hopper-medium-replay: there is no {tmp_path}/mine/local/hopper-medium-replay.hdf5 nor "
        f"{tmp_path}/data/local/hopper-medium-replay.hdf5; "
        "`python -m scripts.collect env=hopper level=medium-replay` makes it"
    )
    for folder in ("data", "mine"):
        path = tmp_path / folder / "local" / "hopper-medium-replay.hdf5"
        path.parent.mkdir(parents=True)
        path.touch()
        assert data.find("local/hopper-medium-replay") == path
    with pytest.raises(ValueError, match="data.dataset"):
        data.find("local/hopper")


def test_minaris_files_are_found_or_said_where_to_put(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    monkeypatch.delenv("MINRNN_DATA", raising=False)
    with pytest.raises(DataError) as error:
        data.find("minari/walker2d-simple")
    assert str(error.value) == (
        f"minari/walker2d-simple: there is no {tmp_path}/minari/walker2d-simple.hdf5; "
        "copy or link Minari's mujoco/walker2d/simple-v0/data/main_data.hdf5 there (below ~/.minari/datasets, "
        "where its own `minari download mujoco/walker2d/simple-v0` puts it)"
    )
    minari(tmp_path / "main_data.hdf5", (3, 4), sizes=(17, 6))
    path = tmp_path / "minari" / "walker2d-simple.hdf5"
    path.parent.mkdir()
    path.symlink_to(tmp_path / "main_data.hdf5")
    assert data.find("minari/walker2d-simple") == path and data.read(path, "minari/walker2d-simple").episodes == 2


def test_a_change_of_a_d4rl_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FOLDER", tmp_path / "data")
    monkeypatch.delenv("MINRNN_DATA", raising=False)
    name = "d4rl/hopper-medium-replay"
    path = tmp_path / "data/d4rl/hopper_medium_replay-v2.hdf5"
    path.parent.mkdir(parents=True)
    save(path, steps((3, 4)))
    assert data.find(name) == path
    found = data.read(path, name)
    checksum = files.pooch.file_hash(path)
    assert found.episodes == 2 and checksum in path.with_name(f"{path.name}.sha256").read_text()
    assert data.find(name) == path
    save(path, steps((3, 5)))
    with pytest.raises(DataError, match=f"{path}: expected sha256 {checksum} as .* says, got .*; remove both"):
        data.find(name)


def expected(dataset, row, context_length):
    """A window by a plain loop, in float64, and how much of it is real."""
    episode = next(e for e in range(dataset.episodes) if row < dataset.starts[e + 1])
    first, end = dataset.starts[episode], dataset.starts[episode + 1]
    mean, std = dataset.mean.astype(np.float64), dataset.std.astype(np.float64)
    window = []
    for i in range(row, min(row + context_length, end)):
        return_to_go = math.fsum(dataset.rewards[j] for j in range(i, end)) / 1000
        window.append(([return_to_go], (dataset.observations[i] - mean) / std, dataset.actions[i], i - first, True))
    return window, len(window)


def check(batch, windows):
    shapes = [(len(windows), batch[0].shape[1], *rest) for rest in ((1,), (11,), (3,), (), ())]
    dtypes = (torch.float32,) * 3 + (torch.int64, torch.bool)
    for i, (found, shape, dtype) in enumerate(zip(batch, shapes, dtypes, strict=True)):
        assert found.shape == shape and found.dtype == dtype
        values = torch.stack([torch.tensor(np.array([step[i] for step in window])) for window in windows])
        torch.testing.assert_close(found, values.to(dtype), rtol=2e-6, atol=2e-6)


def rows_of(dataset, batch):
    """The row that each window begins at, known by its first state."""
    states = (dataset.observations - dataset.mean) / dataset.std
    return [np.abs(states - first).sum(1).argmin() for first in batch[1][:, 0].numpy()]


@pytest.mark.parametrize("context_length", (1, 4, 20))
def test_windows_are_a_plain_loops(dataset, context_length):
    windows = data.Windows(dataset, context_length, "cpu")
    batch = windows.batch(100, seed=5)
    nothing = ([0], np.zeros(11), np.zeros(3), 0, False)
    rows = rows_of(dataset, batch)
    assert {*rows} == {*range(20)}
    padded = []
    for row in rows:
        window, real = expected(dataset, row, context_length)
        padded.append(window + [nothing] * (context_length - real))
    check(batch, padded)
    assert context_length == 1 or not batch[4].all()


@pytest.mark.parametrize("context_length", (1, 4, 20))
def test_padding_on_the_left_is_the_published_one(dataset, context_length):
    windows = data.Windows(dataset, context_length, "cpu")
    batch = windows.batch(100, seed=5)
    nothing = ([0], -dataset.mean.astype(np.float64) / dataset.std, np.full(3, -10), 0, False)
    padded = []
    for row in rows_of(dataset, batch):
        window, real = expected(dataset, row, context_length)
        padded.append([nothing] * (context_length - real) + window)
    check(windows.left_padded(batch), padded)


def test_every_row_is_as_likely_to_begin_a_window(dataset):
    windows = data.Windows(dataset, 3, "cpu")
    counts = np.zeros(20)
    for seed in range(10):
        np.add.at(counts, rows_of(dataset, windows.batch(2000, seed)), 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 50.8  # chi-square of 19 degrees of freedom, 1 in 10,000


def test_a_batch_is_a_function_of_its_seed(dataset):
    windows, others = data.Windows(dataset, 5, "cpu"), data.Windows(dataset, 5, torch.device("cpu"))
    first = windows.batch(32, seed=2**32 - 1)
    torch.manual_seed(1)
    windows.batch(7, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, others.batch(32, seed=2**32 - 1), strict=True))
    assert not torch.equal(first[1], windows.batch(32, seed=4)[1])


def test_a_constant_observation_stays_finite(tmp_path):
    arrays = steps((30,))
    arrays["observations"][:, 2] = 7
    del arrays["next_observations"]
    windows = data.Windows(data.read(save(tmp_path / "a.hdf5", arrays), NAME), 4, "cpu")
    assert all(x.isfinite().all() for x in windows.left_padded(windows.batch(50, 0))[:4])
    with pytest.raises(ValueError, match="data.context_length: expected 1 at least, got 0"):
        data.Windows(data.read(tmp_path / "a.hdf5", NAME), 0, "cpu")


def test_scores_on_other_arrays_are_not_joined(tmp_path, monkeypatch):
    """A set collected anew has another file, for it holds times, and the same arrays."""
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # away from data/
    path = tmp_path / f"{NAME}.hdf5"
    path.parent.mkdir()
    checksum = data.dataset_checksum(save(path, steps((3, 1, 9, 7)), {"seconds": 1.0}), NAME)
    record = {"run_id": "0123456789ab", "config": {"data": {"dataset": NAME}}, "facts": {"dataset_sha256": checksum}}
    planner = SimpleNamespace(known={"0123456789ab": record})
    save(path, steps((3, 1, 9, 7)), {"seconds": 2.0})
    datasets.same_as_before(planner, NAME)
    save(path, steps((3, 1, 9, 7), seed=1))
    with pytest.raises(DataError, match=f"{path} does not hold the arrays of record 0123456789ab"):
        datasets.same_as_before(planner, NAME)
    path.unlink()
    with pytest.raises(DataError, match="is not here: python -m scripts.collect env=hopper level=medium makes it"):
        datasets.same_as_before(planner, NAME)


def elsewhere(path, key):
    """The key lies in another file."""
    with h5py.File(path.with_name("other.hdf5"), "w") as other, h5py.File(path, "a") as file:
        other[key] = file[key][()]
        del file[key]
        file[key] = h5py.ExternalLink("other.hdf5", f"/{key}")


def virtual(path, key):
    with h5py.File(path, "a") as file:
        shape = file[key].shape
        layout = h5py.VirtualLayout(shape, file[key].dtype)
        layout[...] = h5py.VirtualSource(str(path.with_name("other.hdf5")), key, shape)
        del file[key]
        file.create_virtual_dataset(key, layout)


def raw(path, key):
    with h5py.File(path, "a") as file:
        shape = file[key].shape
        del file[key]
        file.create_dataset(key, shape, np.float32, external=[(str(path.with_name("raw")), 0, h5py.h5f.UNLIMITED)])


def empty(path, key):
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = h5py.Empty("f4")


def endless(path, key):
    with h5py.File(path, "a") as file:
        del file[key]
        file.create_dataset(key, (10**12,), np.float32, chunks=(1024,))


def words(path, key):
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = ["many", "words"]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (elsewhere, "expected numbers in this file, got a link to another"),
        (virtual, "expected numbers in this file, got those of others"),
        (raw, "expected numbers in this file, got those of others"),
        (empty, "expected numbers, got nothing"),
        (endless, "expected at most 8 GiB, it says"),
        (words, "expected numbers of shape .*, got object"),
    ],
)
def test_what_lies_in_other_files_or_is_none_is_refused(tmp_path, damage, match):
    path = save(tmp_path / "a.hdf5", steps((3, 1, 9, 7)))
    damage(path, "rewards")
    with pytest.raises(DataError, match=f"{path}: rewards: {match}"):
        data.read(path, NAME)


def test_a_broken_link_that_nobody_reads_does_not_matter(tmp_path):
    path = save(tmp_path / "a.hdf5", steps((3, 1, 9, 7)))
    before = data.read(path, NAME)
    with h5py.File(path, "a") as file:
        file["infos"] = h5py.SoftLink("/nowhere")
        file["more"] = h5py.ExternalLink("nowhere.hdf5", "/x")
    assert data.read(path, NAME).sha256 == before.sha256


def test_actions_beyond_the_environment_are_named(tmp_path):
    arrays = steps((3, 1, 9, 7))
    arrays["actions"][5, 1] = 1.5
    with pytest.raises(DataError, match="actions: expected -1 to 1, the range of Hopper-v4, got up to 1.5"):
        data.read(save(tmp_path / "a.hdf5", arrays), NAME)


def test_a_pipe_is_no_dataset(tmp_path):
    os.mkfifo(tmp_path / "a.hdf5")
    with pytest.raises(DataError, match="expected a file, got a pipe"):
        data.read(tmp_path / "a.hdf5", NAME)
