"""The character model: nanoGPT's data and estimates, and clear words for a text that cannot be used."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import charlm, config, launch, records
from experiments.charlm import sample
from experiments.data import DataError

ROOT = Path(__file__).parent.parent
MODELS = sorted(
    {path.stem for folder in ("charlm/model", "model") for path in (ROOT / "configs" / folder).glob("*.yaml")}
)
TEXT = "".join(chr(97 + (i * i) % 23) for i in range(3000)) + "é\n"


def run_id(cfg):
    return config.run_id(asdict(charlm.identify(cfg)))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def resolve(tmp_path, *overrides):
    places = (f"results_dir={tmp_path}/results", f"output_dir={tmp_path}/outputs")
    common = ("profile=smoke", "logger=none", "progress=false", "threads=1", "device=cpu")
    return launch.resolve("charlm", [*common, *places, *overrides])


def test_characters_are_ids_in_sorted_order_and_nine_tenths_train():
    text = charlm.Text("hello world", "cpu")
    assert text.vocabulary == " dehlorw"
    assert [text.vocabulary[i] for i in (*text.train, *text.val)] == list("hello world")
    assert len(text.train) == 9 and len(text.val) == 2


def test_targets_are_the_next_characters():
    text = charlm.Text(TEXT, "cpu")
    inputs, targets = text.batch(text.train, 50, 16, seed=3)
    assert inputs.shape == targets.shape == (50, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    windows = {tuple(window) for window in text.train.unfold(0, 17, 1).tolist()}
    assert all((*row, last) in windows for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True))
    again, _ = text.batch(text.train, 50, 16, seed=3)
    other, _ = text.batch(text.train, 50, 16, seed=4)
    assert torch.equal(inputs, again) and not torch.equal(inputs, other)


def test_the_last_block_that_fits_can_be_drawn():
    text = charlm.Text("abcdefghij" * 10, "cpu")
    starts = {charlm.Text.batch(text, text.val, 64, 8, seed)[0][i, 0].item() for seed in range(5) for i in range(64)}
    assert starts == {text.val[0].item(), text.val[1].item()}  # 10 characters: blocks of 8 + 1 start at 0 or 1


@pytest.mark.parametrize("length", (33, 41, 48, 49, 300))
def test_the_whole_loss_counts_every_character_once(tmp_path, length):
    cfg = resolve(tmp_path)
    model = charlm.TokenModel(30, 30, 8, 1, charlm.make("mingru", expansion=1))
    part = torch.randint(30, (length,))
    total = 0.0
    with torch.no_grad():
        for start in range(0, length - 1, 16):
            block = part[start : start + 17]
            logits, _ = model(block[None, :-1])
            total += F.cross_entropy(logits[0], block[1:], reduction="sum").item()
        assert charlm.whole_loss(cfg, part, model) == pytest.approx(total / (length - 1), rel=1e-5)


@pytest.mark.parametrize("profile", config.PROFILES)
@pytest.mark.parametrize("model", MODELS)
def test_every_configuration_makes_a_model(tmp_path, text, model, profile):
    cfg = launch.resolve("charlm", [f"model={model}", f"profile={profile}", f"data.path={text}"])
    built = charlm.task(cfg, torch.device("cpu")).model
    logits, _ = built(torch.zeros(1, 5, dtype=torch.long))
    assert logits.shape == (1, 5, len(set(TEXT))) and logits.isfinite().all()


def test_the_transformer_is_nanogpts():
    """Its parameters, without positions, at 6 layers of 384 are FACTS 3.2's; so are those of the small setting."""
    count = {}
    for layers, dim, block in ((6, 384, 256), (4, 128, 64)):
        overrides = ["model=transformer", f"model.layers={layers}", f"model.dim={dim}", f"data.block={block}"]
        cfg = launch.resolve("charlm", overrides).model
        model = charlm.TokenModel(65, 65, mixer=charlm.make(**cfg.mixer(block)), **cfg.backbone(block))
        count[layers] = sum(p.numel() for p in model.parameters()) - block * dim
    assert count == {6: 10_646_784, 4: 795_904}


@pytest.mark.parametrize("model", ("mingru", "minlstm", "transformer"))
def test_a_run_leaves_its_losses(tmp_path, text, model):
    cfg = resolve(tmp_path, f"model={model}", f"data.path={text}", "train.steps=200", "eval.every=100")
    assert charlm.run(cfg) == "done"
    record = records.read_record(records.record_path(tmp_path / "results", "charlm", run_id(cfg)))
    last, best = record["metrics"]["last"], record["metrics"]["best"]
    assert set(last) == {"step", "val_loss", "test_loss"}
    assert best["val_loss"] == min(value for _, _, value in record["curves"]["val_loss"])
    assert last["test_loss"] < 0.9 * record["curves"]["train_loss"][0][2]


@pytest.mark.parametrize(
    ("content", "message"),
    (
        (b"", "data.path: expected at least 170 characters for data.block=16, .* has 0"),
        (b"short", "data.path: expected at least 170 characters for data.block=16, .* has 5"),
        (b"\xff\xfe" * 500, "data.path: expected UTF-8, .* is not"),
        (None, "data.path: cannot read .*No such file"),
    ),
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        charlm.read(resolve(tmp_path, f"data.path={path}"), "cpu")


# Generation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recurrent model and a Transformer that saw a text of ten characters in turn."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("0123456789" * 300)
    runs = {}
    for model in ("mingru", "transformer"):
        overrides = (f"model={model}", f"data.path={folder / 'text.txt'}", "train.steps=150", "eval.every=50")
        cfg = resolve(folder, *overrides)
        assert charlm.run(cfg) == "done"
        runs[model] = run_id(cfg)
    return folder, runs


def settings_of(trained, model, *more):
    folder, runs = trained
    places = (f"results_dir={folder}/results", f"output_dir={folder}/outputs")
    return sample.parse([f"run={runs[model]}", *places, *more])


@pytest.mark.parametrize("model", ("mingru", "transformer"))
def test_it_goes_on_as_the_text_does(trained, model, capsys):
    """Also beyond the Transformer's 16 positions."""
    folder, runs = trained
    places = (f"results_dir={folder}/results", f"output_dir={folder}/outputs")
    sample.main([f"run={runs[model]}", *places, "prompt=34567", "tokens=60", "temperature=0", "--stats"])
    out = capsys.readouterr()
    assert out.out == "34567" + ("8901234567" * 6) + "\n"
    assert "tokens a second" in out.err


@pytest.mark.parametrize("model", ("mingru", "transformer"))
def test_a_prompt_read_at_once_is_one_read_step_by_step(trained, model):
    net, text, _ = sample.load(settings_of(trained, model))
    prompt = torch.tensor([text.ids[c] for c in "0123456"])
    with torch.inference_mode():
        whole, whole_state = sample.start(net, prompt, None)
        logits, state = sample.start(net, prompt[:1], None)
        for token in prompt[1:]:
            logits, state = net.step(token[None], state)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert sample.state_bytes(state) == sample.state_bytes(whole_state)


def test_a_recurrent_state_does_not_grow(trained):
    sizes = {}
    for model in ("mingru", "transformer"):
        settings = settings_of(trained, model, "tokens=14", "temperature=0")
        net, text, _ = sample.load(settings)
        states = [state for _, state in sample.generate(net, torch.tensor([0]), settings)]
        sizes[model] = (sample.state_bytes(states[0]), sample.state_bytes(states[-1]))
    assert sizes["mingru"][0] == sizes["mingru"][1] and sizes["transformer"][0] < sizes["transformer"][1]


def test_the_choice_keeps_to_temperature_and_top_k():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        settings = sample.Settings(**options)
        return (
            torch.stack([sample.choose(logits, settings, generator) for _ in range(4000)]).bincount(minlength=4) / 4000
        )

    torch.testing.assert_close(drawn(temperature=0.5), (logits / 0.5).softmax(-1), atol=0.03, rtol=0)
    two = drawn(temperature=1.0, top_k=2)
    torch.testing.assert_close(two[:2], logits[:2].softmax(-1), atol=0.03, rtol=0)
    assert two[2:].sum() == 0 and drawn(temperature=0)[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (["prompt=Ü4"], "prompt: 'Ü' is not among the text's 10 characters"),
        (["prompt="], "prompt: expected a character at least"),
        (["tokens=many"], "tokens: expected int, got 'many'"),
        (["tokens=0"], "expected tokens >= 1"),
        (["temprature=1"], "temprature=1: no such setting; the nearest is temperature="),
        (["output_dir=nowhere"], "has a record, but no weights in nowhere"),
    ),
)
def test_what_cannot_be_sampled_is_said(trained, change, message):
    folder, runs = trained
    places = (f"results_dir={folder}/results", f"output_dir={folder}/outputs")
    with pytest.raises(ValueError, match=message):
        sample.main([f"run={runs['mingru']}", *places, *change])


def test_a_run_that_does_not_exist_names_the_nearest(trained):
    folder, runs = trained
    near = runs["mingru"][:-1] + "x"
    with pytest.raises(ValueError, match=f"no run '{near}' in .*; the nearest is {runs['mingru']}"):
        sample.load(sample.parse([f"run={near}", f"results_dir={folder}/results"]))
