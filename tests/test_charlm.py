"""The character model: nanoGPT's data and estimates, and clear words for a text that cannot be used."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import charlm, config, launch, records
from experiments.data import DataError

ROOT = Path(__file__).parent.parent
MODELS = sorted(
    {path.stem for folder in ("charlm/model", "model") for path in (ROOT / "configs" / folder).glob("*.yaml")}
)
TEXT = "".join(chr(97 + (i * i) % 23) for i in range(3000)) + "é\n"


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
    record = records.read_record(records.record_path(tmp_path / "results", "charlm", config.run_id(asdict(cfg))))
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
