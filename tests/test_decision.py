"""Decision RNNs: the model is one thing in parallel and step by step; episodes are what a plain loop makes of them."""

from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from experiments import checkpoints, config, decision, launch, records
from experiments.data import DataError
from experiments.decision import data, episodes
from experiments.decision.episodes import rollout
from experiments.seeds import eval_seed
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
    return DecisionModel(STATE, ACTION, 16, 2, MIXERS[mixer], max_ep_len=30, tokens=tokens, mlp=2).eval()


def windows(batch=4, K=7):
    timesteps = torch.arange(K).expand(batch, K) + torch.randint(20, (batch, 1))
    return torch.randn(batch, K, 1), torch.randn(batch, K, STATE), torch.randn(batch, K, ACTION), timesteps


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize("mixer", MIXERS)
def test_step_by_step_is_all_at_once(mixer, tokens):
    net = model(mixer, tokens)
    returns_to_go, states, actions, timesteps = windows()
    timesteps = timesteps[:1].expand(4, -1)  # in step, as in a rollout
    with torch.no_grad():
        whole = net(returns_to_go, states, actions, timesteps)
        hidden, previous, steps = net.initial_state(4), None, []
        for t in range(timesteps.shape[1]):
            action, hidden = net.step(returns_to_go[:, t], states[:, t], previous, int(timesteps[0, t]), hidden)
            steps.append(action)
            previous = actions[:, t]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize("mixer", MIXERS)
def test_an_action_depends_on_what_came_before_it_alone(mixer, tokens):
    """On the return-to-go and the state of its own step and on the actions before; by gradients."""
    net = model(mixer, tokens)
    *inputs, timesteps = windows()
    inputs = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(net(*inputs, timesteps)[:, 3].sum(), inputs)
    for grad, last in zip(grads, (3, 3, 2), strict=True):
        read = grad.abs().sum((0, 2)) > 1e-5 * grad.abs().sum()  # a convolution by FFT rounds
        assert read.tolist() == [t <= last for t in range(7)]


def test_one_token_a_step_is_joined_as_in_decision_s4():
    """tanh of a Linear each of state, action before and return-to-go, side by side, through a Linear; no timesteps."""
    net = model("s4", tokens=1).double()
    returns_to_go, states, actions, timesteps = (x.double() if x.is_floating_point() else x for x in windows())
    read = []
    net.backbone.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    with torch.no_grad():
        net(returns_to_go, states, actions, timesteps)
        for b in range(4):
            for t in range(7):
                before = actions[b, t - 1] if t else torch.zeros(ACTION, dtype=torch.float64)
                parts = (
                    (net.embed_state, states[b, t]),
                    (net.embed_action, before),
                    (net.embed_return, returns_to_go[b, t]),
                )
                joined = torch.cat([torch.tanh(embed.weight @ x + embed.bias) for embed, x in parts])
                expected = net.input_projection.weight @ joined + net.input_projection.bias
                torch.testing.assert_close(read[0][b, t], expected, rtol=1e-12, atol=1e-12)
    assert not hasattr(net, "embed_timestep") and not hasattr(net, "embed_ln")


class Fake(gymnasium.Env):
    """Ends after a number of steps that its seed says; rewards the action; the state is timestep and seed."""

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


def plain(net, target, seed, context_length, left_padding=False):
    """One episode by itself; the whole history is read at each step."""
    env, total = Fake(), 0.0
    observation, _ = env.reset(seed=seed)
    returns_to_go, states, actions, left = [], [], [], float(target)
    for timestep in range(30):
        states.append((torch.tensor(observation, dtype=torch.float32) - MEAN) / STD)
        returns_to_go.append([left / 1000])
        actions.append([0.0] * ACTION)
        first = 0 if context_length is None else max(0, timestep + 1 - context_length)
        parts = torch.tensor(returns_to_go[first:]), torch.stack(states[first:]), torch.tensor(actions[first:])
        timesteps = torch.arange(first, timestep + 1)
        if left_padding:
            missing = context_length - len(timesteps)
            parts = tuple(torch.cat([torch.zeros(missing, x.shape[1]), x]) for x in parts)
            timesteps = torch.cat([torch.zeros(missing, dtype=torch.long), timesteps])
        with torch.no_grad():
            action = net(*(x[None] for x in (*parts, timesteps)))[0, -1]
        actions[-1] = action.tolist()
        observation, reward, terminated, _, _ = env.step(action.numpy())
        total, left = total + reward, left - reward
        if terminated:
            return total, timestep + 1


@pytest.mark.parametrize("tokens", (1, 3))
@pytest.mark.parametrize(
    ("mixer", "context_length", "left_padding"),
    (
        ("mingru", None, False),
        ("lstm", None, False),
        ("mingru", 4, False),
        ("mingru", 4, True),
        ("attention", 4, False),
    ),
)
def test_a_batch_of_episodes_is_each_by_itself(mixer, context_length, left_padding, tokens):
    net, targets = model(mixer, tokens), np.array([100.0, 300.0, 1000.0, -50.0, 2000.0, 0.0])
    seeds = np.array([7, 8, 3, 10, 11, 7])
    returns, lengths = rollout(net, "Fake-v0", MEAN, STD, targets, seeds, context_length, left_padding)
    for i, (target, seed) in enumerate(zip(targets, seeds.tolist(), strict=True)):
        expected, length = plain(net, target, seed, context_length, left_padding)
        assert lengths[i] == length and returns[i] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert len(set(lengths)) > 2


def test_a_rollout_calls_back():
    times = []
    _, lengths = rollout(
        model(), "Fake-v0", MEAN, STD, np.zeros(5), np.arange(5), None,
        callback=lambda envs: times.append([env.unwrapped.time for env in envs]),
    )  # fmt: skip
    assert times == [np.minimum(t, lengths).tolist() for t in range(lengths.max() + 1)]


def test_an_episode_ends_at_the_limit(monkeypatch):
    monkeypatch.setattr(episodes, "MAX_EP_LEN", 4)
    _, lengths = rollout(model(), "Fake-v0", MEAN, STD, np.zeros(5), np.arange(5), None)
    assert lengths.tolist() == [3, 4, 4, 4, 4]


def test_errors():
    with pytest.raises(ValueError, match="tokens: expected 1 or 3, got 2"):
        model(tokens=2)
    with pytest.raises(ValueError, match="init: expected .*'torch'.*, got 'x'"):
        partial(DecisionModel, STATE, ACTION, 16, 2, MIXERS["gru"])(init="x")


# -- evaluation


class Asked:
    """Stands in for `rollout`; a return is 10 for each step looked back (1000 for all), and the target's hundredth."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, env_id, mean, std, targets, seeds, context_length, left_padding):
        self.calls.append((env_id, targets.tolist(), seeds.tolist(), context_length, left_padding))
        return targets / 100 + (1000 if context_length is None else 10 * context_length), np.full(len(targets), 7)


def evaluated(monkeypatch, env, *settings):
    cfg = launch.resolve("decision", ["profile=cpu", "eval.episodes=2", *settings])
    dataset = SimpleNamespace(env=env, mean=np.zeros(3, np.float32), std=np.ones(3, np.float32))
    asked = Asked()
    monkeypatch.setattr(decision, "rollout", asked)
    calls = (decision.evaluate, "val"), (decision.evaluate, "test"), (decision.evaluate_last, "test")
    return asked.calls, *(function(cfg, dataset, model(), split) for function, split in calls)


def test_a_recurrent_model_is_asked_in_both_ways(monkeypatch):
    calls, val, test, last = evaluated(monkeypatch, "halfcheetah", "model=mingru")
    score = partial(data.normalized, "halfcheetah")
    assert val == {"score": score(1120), "return": 1120, "length": 7}
    assert test == {
        "score": score(1120), "score_window": score(320), "score_carried": score(1120), "return": 1120, "length": 7
    }  # fmt: skip
    targets = {"second_target": 6000} | {f"at_{s}": -280.178953 + s / 100 * (12135 + 280.178953) for s in (20, 60, 100)}
    assert last == pytest.approx({f"score_{name}": score(1000 + target / 100) for name, target in targets.items()})
    v, t = eval_seed("val", 0), eval_seed("test", 0)
    assert calls[:3] == [
        ("HalfCheetah-v4", [12000, 12000], [v, v + 1], None, False),
        ("HalfCheetah-v4", [12000, 12000], [t, t + 1], 20, False),
        ("HalfCheetah-v4", [12000, 12000], [t, t + 1], None, False),
    ]
    assert calls[3][1:] == (np.repeat([*targets.values()], 2).tolist(), [t, t + 1] * 4, None, False) and len(calls) == 4


def test_decision_mamba_is_asked_with_a_padded_window(monkeypatch):
    calls, val, test, last = evaluated(monkeypatch, "hopper", "model=mamba", "data.context_length=10")
    score = partial(data.normalized, "hopper")
    assert val["score"] == test["score"] == test["score_window"] == score(136)
    assert test["score_carried"] == score(1036) and last["score_second_target"] == score(118)
    assert [call[3:] for call in calls] == [(10, True), (10, True), (None, True), (10, True)]


def test_decision_transformer_is_asked_with_a_window(monkeypatch):
    calls, _, test, _ = evaluated(monkeypatch, "walker2d", "model=transformer")
    assert "score_carried" not in test and test["score"] == test["score_window"]
    assert [call[3:] for call in calls] == [(20, False)] * 3


# -- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few episodes of Hopper by chance."""
    folder = tmp_path_factory.mktemp("data")
    env, rng, rows = gymnasium.make("Hopper-v4"), np.random.default_rng(0), []
    observation, _ = env.reset(seed=0)
    for _ in range(300):
        action = rng.uniform(-1, 1, 3).astype(np.float32)
        next_observation, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else next_observation
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
        ("model=mingru",),
        ("model=minlstm", "data.padding=left", "data.tokens=1", "eval.context_length=5"),
        ("model=transformer",),
        ("model=mamba", "model.dropout=0.1"),
        ("model=s4",),
        ("model=aaren",),
    ),
)
def test_a_run_leaves_its_scores(tmp_path, monkeypatch, folder, settings):
    monkeypatch.setenv("MINRNN_DATA", str(folder))
    cfg = resolve(tmp_path, *settings)
    assert decision.run(cfg) == "done"
    name = config.run_id(asdict(cfg))
    record = records.read_record(records.record_path(tmp_path / "results", "decision", name))
    carried = {"test_score_carried"} - ({"test_score_carried"} if settings == ("model=transformer",) else set())
    common = {"step", *(f"{split}_{x}" for split in ("val", "test") for x in ("score", "return", "length"))}
    common |= {"test_score_window"} | carried
    extra = {"test_score_second_target", *(f"test_score_at_{score}" for score in decision.TARGETS)}
    assert {*record["metrics"]["best"]} == common and {*record["metrics"]["last"]} == common | extra
    for metrics in record["metrics"].values():
        low, high = data.ENVIRONMENTS["hopper"].reference
        assert metrics["test_score"] == pytest.approx(100 * (metrics["test_return"] - low) / (high - low))
        assert 1 <= metrics["test_length"] <= 1000
    assert [step for step, _, _ in record["curves"]["val_score"]] == [5, 10]
    assert checkpoints.load(records.work_dir(tmp_path / "outputs", "decision", name), "cpu", {})["state"]["step"] == 10
    expected = data.dataset_checksum(folder / "local" / "hopper-random.hdf5", "local/hopper-random")
    assert record["facts"]["dataset_sha256"] == expected and record["versions"]["mujoco"]
    assert record["facts"]["target_returns"] == [3600, 1800]


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
    with pytest.raises(ValueError, match="eval.context_length: expected a number of steps, attention has no recurrent"):
        decision.run(resolve(tmp_path, "model=transformer", "eval.context_length=null"))
    with pytest.raises(ValueError, match="data.padding: expected right for attention"):
        decision.run(resolve(tmp_path, "model=transformer", "data.padding=left"))
    with pytest.raises(ValueError, match="eval.episodes: expected more than 0, got 0"):
        resolve(tmp_path, "eval.episodes=0")
    with pytest.raises(DataError, match="scripts.collect env=walker2d level=medium` makes it"):
        decision.run(resolve(tmp_path, "data.dataset=local/walker2d-medium"))
    with pytest.raises(ValueError, match="the nearest is 'local/hopper-medium'"):
        decision.run(resolve(tmp_path, "data.dataset=local/hoper-medium"))
    with pytest.raises(ValueError, match="model.positions, model.tied: expected false"):
        decision.run(resolve(tmp_path, "model=transformer", "model.tied=true"))
