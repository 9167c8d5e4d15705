"""Decision RNNs: the model is one thing in parallel and step by step; episodes are what a plain loop makes of them."""

import hashlib
from dataclasses import asdict
from functools import partial

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from experiments import checkpoints, config, decision, launch, records
from experiments.data import DataError
from experiments.decision import data, episodes
from experiments.decision.episodes import rollout
from minrnn.mixers import make
from minrnn.models import DecisionModel

MIXERS = {
    "mingru": make("mingru", expansion=2),
    "minlstm": make("minlstm", expansion=2),
    "gru": make("gru"),
    "lstm": make("lstm"),
    "aaren": make("aaren"),
    "mamba": make("ssm", inner="s6", wrapping="mamba"),
    "s4": make("ssm", inner="s4", wrapping="none"),
    "attention": make("attention", heads=2),
}
STATE, ACTION = 3, 2


def model(mixer="mingru", tokens=3, seed=0):
    torch.manual_seed(seed)
    net = DecisionModel(STATE, ACTION, 16, 2, MIXERS[mixer], steps=30, tokens=tokens, mlp=2)
    return net.eval()


def windows(batch=4, K=7):
    times = torch.arange(K).expand(batch, K) + torch.randint(20, (batch, 1))
    return torch.randn(batch, K, 1), torch.randn(batch, K, STATE), torch.randn(batch, K, ACTION), times


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize("mixer", MIXERS)
def test_step_by_step_is_all_at_once(mixer, tokens):
    net = model(mixer, tokens)
    wanted, states, actions, times = windows()
    times = times[:1].expand(4, -1)  # in step, as in a rollout
    with torch.no_grad():
        whole = net(wanted, states, actions, times)
        state, before, steps = net.initial_state(4), None, []
        for t in range(times.shape[1]):
            action, state = net.step(wanted[:, t], states[:, t], before, int(times[0, t]), state)
            steps.append(action)
            before = actions[:, t]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize("mixer", MIXERS)
def test_an_action_depends_on_what_came_before_it_alone(mixer, tokens):
    """On the return and the state of its own step and on the actions before; by gradients."""
    net = model(mixer, tokens)
    *inputs, times = windows()
    inputs = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(net(*inputs, times)[:, 3].sum(), inputs)
    for grad, last in zip(grads, (3, 3, 2), strict=True):
        seen = grad.abs().sum((0, 2)) > 1e-5 * grad.abs().sum()  # a convolution by FFT rounds
        assert seen.tolist() == [t <= last for t in range(7)]


class Fake(gymnasium.Env):
    """Ends after a number of steps that its seed says; rewards what was done; the state is time and seed."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (STATE,))
    action_space = gymnasium.spaces.Box(-1, 1, (ACTION,))

    def reset(self, *, seed=None, options=None):
        self.seed, self.time = seed, 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.time / 10, np.sin(self.seed), 1.0])

    def step(self, action):
        self.time += 1
        return self.observe(), 50 * float(action.sum()), self.time >= 3 + self.seed % 5, False, {}


gymnasium.register("Fake-v0", entry_point=Fake)
MEAN, STD = torch.tensor([0.5, 0.1, 0.0]), torch.tensor([1.0, 2.0, 1.0])


def plain(net, target, seed, context, padded=False):
    """One episode by itself; the whole history is read at each step."""
    env, total = Fake(), 0.0
    seen, _ = env.reset(seed=seed)
    wanted, states, actions, left = [], [], [], float(target)
    for time in range(30):
        states.append((torch.tensor(seen, dtype=torch.float32) - MEAN) / STD)
        wanted.append([left / 1000])
        actions.append([0.0] * ACTION)
        first = 0 if context is None else max(0, time + 1 - context)
        parts = torch.tensor(wanted[first:]), torch.stack(states[first:]), torch.tensor(actions[first:])
        times = torch.arange(first, time + 1)
        if padded:
            missing = context - len(times)
            parts = tuple(torch.cat([torch.zeros(missing, x.shape[1]), x]) for x in parts)
            times = torch.cat([torch.zeros(missing, dtype=torch.long), times])
        with torch.no_grad():
            action = net(*(x[None] for x in (*parts, times)))[0, -1]
        actions[-1] = action.tolist()
        seen, reward, over, _, _ = env.step(action.numpy())
        total, left = total + reward, left - reward
        if over:
            return total, time + 1


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize(
    ("mixer", "context", "padded"),
    (
        ("mingru", None, False),
        ("lstm", None, False),
        ("mingru", 4, False),
        ("mingru", 4, True),
        ("attention", 4, False),
    ),
)
def test_a_batch_of_episodes_is_each_by_itself(mixer, context, padded, tokens):
    net, targets = model(mixer, tokens), np.array([100.0, 300.0, 1000.0, -50.0, 2000.0, 0.0])
    returns, lengths = rollout(net, "Fake-v0", MEAN, STD, targets, 7, context, padded)
    for i, target in enumerate(targets):
        expected, length = plain(net, target, 7 + i, context, padded)
        assert lengths[i] == length and returns[i] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert len(set(lengths)) > 2


def test_a_rollout_can_be_watched():
    times = []
    _, lengths = rollout(model(), "Fake-v0", MEAN, STD, np.zeros(5), 0, None, watch=lambda envs: times.append(
        [env.unwrapped.time for env in envs]
    ))  # fmt: skip
    assert times == [np.minimum(t, lengths).tolist() for t in range(lengths.max() + 1)]


def test_an_episode_ends_at_the_limit(monkeypatch):
    monkeypatch.setattr(episodes, "EPISODE", 4)
    _, lengths = rollout(model(), "Fake-v0", MEAN, STD, np.zeros(5), 0, None)
    assert lengths.tolist() == [3, 4, 4, 4, 4]


def test_errors():
    with pytest.raises(ValueError, match="tokens: expected 1 or 3, got 2"):
        model(tokens=2)
    with pytest.raises(ValueError, match="init: expected 'torch' or 'gpt2', got 'x'"):
        partial(DecisionModel, STATE, ACTION, 16, 2, MIXERS["gru"])(init="x")


# -- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few episodes of Hopper by chance."""
    folder = tmp_path_factory.mktemp("data")
    env, rng, rows = gymnasium.make("Hopper-v4"), np.random.default_rng(0), []
    seen, _ = env.reset(seed=0)
    for _ in range(300):
        action = rng.uniform(-1, 1, 3).astype(np.float32)
        after, reward, fell, over, _ = env.step(action)
        rows.append((seen, action, reward, fell, over))
        seen = env.reset()[0] if fell or over else after
    (folder / "local").mkdir()
    with h5py.File(folder / "local" / "hopper-random.hdf5", "w") as file:
        for name, column in zip(data.KEYS, zip(*rows, strict=True), strict=False):
            file[name] = np.array(column)
    return folder


def resolve(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    common = ("profile=smoke", "logger=none", "progress=false", "threads=1", "device=cpu")
    return launch.resolve("decision", [*common, *places, *overrides])


@pytest.mark.parametrize(
    "settings",
    (
        ("model=mingru", "eval.context=null"),
        ("model=mingru", "data.padding=left", "data.tokens=1"),
        ("model=transformer",),
        ("model=mamba", "model.dropout=0.1"),
    ),
)
def test_a_run_leaves_its_scores(tmp_path, monkeypatch, folder, settings):
    monkeypatch.setenv("MINRNN_DATA", str(folder))
    cfg = resolve(tmp_path, *settings)
    assert decision.run(cfg) == "done"
    name = config.run_id(asdict(cfg))
    record = records.read_record(records.record_path(tmp_path / "results", "decision", name))
    for metrics in record["metrics"].values():
        assert {"val_score", "test_score", *(f"test_score_at_{asked}" for asked in decision.TARGETS)} < set(metrics)
        low, high = data.ENVIRONMENTS["hopper"].reference
        assert metrics["test_score"] == pytest.approx(100 * (metrics["test_return"] - low) / (high - low))
        assert 1 <= metrics["test_length"] <= 1000
    assert [step for step, _, _ in record["curves"]["val_score"]] == [5, 10]
    assert checkpoints.load(records.work_dir(tmp_path / "outputs", "decision", name), "cpu")["state"]["step"] == 10
    expected = hashlib.sha256((folder / "local" / "hopper-random.hdf5").read_bytes()).hexdigest()
    assert record["facts"]["dataset_sha256"] == expected and record["versions"]["mujoco"]


def test_the_loss_is_of_real_steps_alone(folder, monkeypatch):
    """What stands in the padding, inputs and targets, changes nothing; with a model that takes any notice of it."""
    dataset = data.read(folder / "local" / "hopper-random.hdf5", "local/hopper-random")
    windows = data.Windows(dataset, 12, "cpu")
    batch = windows.batch(40, 0)
    mask = batch[4]
    assert not mask.all()
    net = DecisionModel(11, 3, 16, 1, MIXERS["mingru"]).eval()
    noise = [torch.where(mask[..., None], x, torch.randn_like(x)) for x in batch[:3]]
    with torch.no_grad():
        whole = decision.loss(net, batch)
        assert torch.equal(whole, decision.loss(net, (*noise, *batch[3:])))
        out = net(*batch[:4])
    square = [(out[i, t] - batch[2][i, t]).square().mean() for i, t in mask.nonzero().tolist()]
    torch.testing.assert_close(whole, torch.stack(square).mean())


def test_what_a_run_cannot_do_is_said(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("MINRNN_DATA", str(folder))
    with pytest.raises(ValueError, match="attention here has no mask"):
        decision.run(resolve(tmp_path, "model=transformer", "eval.context=null"))
    with pytest.raises(DataError, match="scripts.collect env=walker2d level=medium` makes it"):
        decision.run(resolve(tmp_path, "data.dataset=local/walker2d-medium"))
    with pytest.raises(ValueError, match="the nearest is 'local/hopper-medium'"):
        decision.run(resolve(tmp_path, "data.dataset=local/hoper-medium"))
    with pytest.raises(ValueError, match="model.positions, model.tied: expected false"):
        decision.run(resolve(tmp_path, "model=transformer", "model.tied=true"))
