"""A strip of an episode: capsules lie where MuJoCo's description of the robots puts them; what is missing is said."""

import shutil
from dataclasses import asdict

import gymnasium
import h5py
import matplotlib.image
import mujoco
import numpy as np
import pytest

from experiments import config, decision, launch, records
from experiments.decision import data, strip
from experiments.seeds import eval_seed
from scripts import weights

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")


def simulated(name):
    with gymnasium.make(name) as env:
        return env.unwrapped.model, env.unwrapped.init_qpos


def turned(points, pivot, angle):
    """About the axis that points away from who sees x to the right and z up: clockwise."""
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (points - pivot) @ matrix.T + pivot


# x and z of the ends of torso, thigh, leg and foot, upright, and the anchors of the joints, as the first hopper.xml of
# gym had them, which counts from the ground: torso 1.45 to 1.05, thigh to 0.6, leg to 0.1, foot -0.13 to 0.26.
HOPPER = np.array([[[0, 1.45], [0, 1.05]], [[0, 1.05], [0, 0.6]], [[0, 0.6], [0, 0.1]], [[-0.13, 0.1], [0.26, 0.1]]])
ROOT, HIP, KNEE, ANKLE = (0, 1.25), (0, 1.05), (0, 0.6), (0, 0.1)


@pytest.mark.parametrize("angles", ((0, 0, 0, 0), (0.3, 0, 0, 0), (0, -0.5, 0, 0), (0.2, -0.7, -0.4, 0.6)))
def test_hoppers_capsules_are_where_its_description_says(angles):
    model, upright = simulated("Hopper-v4")
    pitch, hip, knee, ankle = angles
    expected = HOPPER.copy()
    # from the ankle up: each joint turns all that hangs on it, about its anchor in the upright robot
    expected[3:] = turned(expected[3:], ANKLE, -ankle)
    expected[2:] = turned(expected[2:], KNEE, -knee)
    expected[1:] = turned(expected[1:], HIP, -hip)
    expected = turned(expected, ROOT, pitch) + (7.5, 0.25)
    found = strip.capsules(model, upright + np.array([[7.5, 0.25, pitch, hip, knee, ankle]]))
    assert found.shape == (1, 4, 2, 2)
    for segment, wanted in zip(found[0], expected, strict=True):
        np.testing.assert_allclose(sorted(segment.tolist()), sorted(wanted.tolist()), atol=1e-9)


@pytest.mark.parametrize("env", data.ENVIRONMENTS)
def test_what_is_drawn_is_what_mujoco_has(env):
    """Each outline is at the capsule's radius from its axis, and round its middle; but for a shift of the frame."""
    model, start = simulated(data.ENVIRONMENTS[env].id)
    positions = start + np.random.default_rng(0).normal(0, 0.3, (40, len(start)))
    steps = np.array([0, 7, 39])
    (ax,) = strip.figure(model, positions, steps, "a title").axes
    body = [g for g in range(model.ngeom) if model.geom(g).name != "floor"]
    outlines = np.array([patch.get_xy()[:-1] for patch in ax.patches]).reshape(3, len(body), -1, 2)
    moment, shifts = mujoco.MjData(model), []
    for frame, step in zip(outlines, steps, strict=True):
        moment.qpos[:] = positions[step]
        mujoco.mj_forward(model, moment)
        shift = frame[0].mean(0) - moment.geom_xpos[body[0]][[0, 2]]
        for points, g in zip(frame, body, strict=True):
            radius, half, _ = model.geom_size[g]
            middle = moment.geom_xpos[g][[0, 2]] + shift
            axis = moment.geom_xmat[g].reshape(3, 3)[[0, 2], 2]
            along = np.clip((points - middle) @ axis, -half, half)
            np.testing.assert_allclose(points.mean(0), middle, atol=1e-9)
            np.testing.assert_allclose(np.linalg.norm(points - middle - along[:, None] * axis, axis=1), radius)
            assert along.min() == -half and along.max() == half
        assert shift[1] == pytest.approx(0, abs=1e-9)  # nobody floats
        shifts.append(shift[0])
    low, high = outlines[..., 0].min((1, 2)), outlines[..., 0].max((1, 2))
    assert (low[1:] > high[:-1]).all() and ax.get_xlim()[0] < low[0] and high[-1] < ax.get_xlim()[1]
    labels = [text.get_text() for text in ax.texts]
    ways = positions[steps, 0] - positions[0, 0]
    assert labels == [f"step {step}\n{way:.1f} m" for step, way in zip(steps, ways, strict=True)]


def test_a_sphere_is_a_circle():
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><geom type="plane" size="1 1 1"/><body pos="1 2 3"><joint type="slide" axis="1 0 0"/>'
        '<geom type="sphere" size="0.5"/></body></worldbody></mujoco>'
    )
    (ends,) = strip.capsules(model, np.array([[0.25]]))[0]
    assert ends.tolist() == [[1.25, 3], [1.25, 3]]
    np.testing.assert_allclose(np.linalg.norm(strip.outline(ends, 0.5) - (1.25, 3), axis=1), 0.5)


@pytest.mark.parametrize(
    "steps, frames, every, expected",
    (
        (100, 5, 0, [0, 25, 50, 75, 100]),
        (10, 4, 0, [0, 3, 7, 10]),
        (2, 12, 0, [0, 1, 2]),
        (100, 1, 0, [0]),
        (100, 4, 8, [0, 8, 16, 24]),
        (20, 4, 8, [0, 8, 16]),
    ),
)
def test_frames_are_spread_over_the_episode_or_come_every_so_often(steps, frames, every, expected):
    assert strip.chosen(steps, frames, every).tolist() == expected


# -- of a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and id of a small run on a few rows of Hopper by chance."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    (folder / "data" / "local").mkdir(parents=True)
    with h5py.File(folder / "data" / "local" / "hopper-random.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(50, 11)), rng.uniform(-1, 1, (50, 3))
        file["rewards"], file["terminals"] = rng.normal(size=50), np.arange(50) % 10 == 9
    cfg = launch.resolve("decision", [
        "profile=smoke", "logger=none", "progress=false", "threads=1", "device=cpu", "model=mingru",
        f"results_dir={folder}/results", f"output_dir={folder}/outputs",
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINRNN_DATA", str(folder / "data"))
        assert decision.run(cfg) == "done"
    return folder, config.run_id(asdict(cfg))


@pytest.fixture
def arguments(trained, monkeypatch):
    folder, name = trained
    monkeypatch.setenv("MINRNN_DATA", str(folder / "data"))
    return [f"run={name}", f"results_dir={folder}/results", f"output_dir={folder}/outputs"]


def test_a_strip_of_a_run(arguments, tmp_path, capsys):
    path = tmp_path / "a.png"
    strip.main([*arguments, f"path={path}", "target=40", "frames=6", "every=2"])
    height, width, _ = matplotlib.image.imread(path).shape
    assert 150 <= height <= 600 and 500 <= width <= 2200 and 3_000 < path.stat().st_size < 300_000
    assert f"{path}: mingru on local/hopper-random: asked for a score of 40, got " in capsys.readouterr().out


def test_the_episode_is_the_evaluations(arguments):
    settings = strip.parse([*arguments, "target=40", "seed=3"])
    _, positions, score = strip.play(settings, strip.load(settings))
    with gymnasium.make("Hopper-v4") as env:
        env.reset(seed=eval_seed("test", 3))
        assert np.array_equal(positions[0], env.unwrapped.data.qpos)
    assert len(positions) > 5 and np.diff(positions, axis=0).any(1).all()
    # Hopper's reward is its speed and 1 for standing, less a thousandth of the actions' squares
    returns = score / 100 * (3234.3 + 20.272305) - 20.272305
    steps, way = len(positions) - 1, positions[-1, 0] - positions[0, 0]
    assert returns == pytest.approx(steps + way / 0.008, abs=3e-3 * steps)


def test_a_policy_that_comes_with_the_repository_needs_no_dataset(trained, arguments, tmp_path, monkeypatch, capsys):
    weights.main(["decision", *arguments])
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path))
    strip.main([arguments[1], f"path={tmp_path / 'a.png'}"])
    assert "mingru on local/hopper-random: asked for a score of 80" in capsys.readouterr().out
    card = (trained[0] / "results/weights/decision-mingru/README.md").read_text()
    assert "local/hopper-random" in card and "Score " in card


def test_what_is_missing_is_said(trained, arguments, tmp_path, monkeypatch):
    folder, name = trained
    with pytest.raises(ValueError, match=f"run: no run '{name[:-1]}x' in .*; the nearest is {name}"):
        strip.main([f"run={name[:-1]}x", *arguments[1:]])
    with pytest.raises(ValueError, match="there is none: python -m experiments.decision makes one"):
        strip.main([arguments[0], f"results_dir={tmp_path}"])
    with pytest.raises(ValueError, match=f"has a record, but no weights in {tmp_path}/decision/{name} .* do it again"):
        strip.main([*arguments[:2], f"output_dir={tmp_path}"])
    path = records.record_path(tmp_path, "decision", name)
    record = records.read_record(records.record_path(folder / "results", "decision", name))
    records.write_json(path, record | {"status": "diverged", "reason": "loss was nan"})
    with pytest.raises(ValueError, match=rf"expected one that is done, {name} is diverged \(loss was nan\)"):
        strip.main([arguments[0], f"results_dir={tmp_path}", arguments[2]])
    records.write_json(path, record | {"steps": 20})
    with pytest.raises(ValueError, match="are those after step 10, the record is of 20: the run was finished else"):
        strip.main([arguments[0], f"results_dir={tmp_path}", arguments[2]])
    shutil.copytree(folder / "data", tmp_path / "data")
    with h5py.File(tmp_path / "data" / "local" / "hopper-random.hdf5", "a") as file:
        file["rewards"][0] = 7
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path / "data"))
    with pytest.raises(ValueError, match=f"{name} was trained on another local/hopper-random: expected sha256"):
        strip.main(arguments)


@pytest.mark.parametrize(
    "argument, words",
    (
        ("frame=3", "frame=3: no such setting; the nearest is frames="),
        ("frames=x", "frames: expected int, got 'x'"),
        ("frames=0", "frames: expected 1 to 100, got 0"),
        ("seed=-1", "seed: expected 0 to 1073741823, got -1"),
        ("every=-1", "every: expected 0 to 1000, got -1"),
        ("target=nan", "target: expected a finite number, got nan"),
        ("path=a.jpeg", "path: expected a name that ends in .png, .pdf or .svg, got 'a.jpeg'"),
    ),
)
def test_settings_that_cannot_be_are_refused(argument, words):
    with pytest.raises(ValueError, match=words):
        strip.parse([argument])
