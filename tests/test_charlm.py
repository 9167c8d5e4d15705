"""The character model: nanoGPT's data and estimates, and clear words for a text that cannot be used."""

import hashlib
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import charlm, config, data, grid, launch, records
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
@pytest.mark.parametrize("model", [name for name in MODELS if name != "attention"])
def test_every_configuration_makes_a_model(tmp_path, text, model, profile):
    cfg = launch.resolve("charlm", [f"model={model}", f"profile={profile}", f"data.path={text}"])
    built = charlm.task(cfg, torch.device("cpu")).model
    logits, _ = built(torch.zeros(1, 5, dtype=torch.long))
    assert logits.shape == (1, 5, len(set(TEXT))) and logits.isfinite().all()


def test_the_transformer_is_nanogpts():
    """Its parameters, without positions, at 6 layers of 384 are FACTS 3.2's; so are those of the small setting."""
    count = {}
    for layers, dim, block in ((6, 384, 256), (4, 128, 64)):
        overrides = ["model=transformer", f"model.layers={layers}", f"model.dim={dim}", f"data.block_size={block}"]
        cfg = launch.resolve("charlm", overrides).model
        model = charlm.TokenModel(65, 65, mixer=charlm.make(**cfg.mixer(block)), **cfg.backbone(block))
        count[layers] = sum(p.numel() for p in model.parameters()) - block * dim
    assert count == {6: 10_646_784, 4: 795_904}


@pytest.mark.parametrize("model", ("mingru", "minlstm", "transformer"))
def test_a_run_leaves_its_losses(tmp_path, text, model):
    cfg = resolve(tmp_path, f"model={model}", f"data.path={text}", "train.steps=200", "eval.interval=100")
    assert charlm.run(cfg) == "done"
    record = records.read_record(records.record_path(tmp_path / "results", "charlm", run_id(cfg)))
    last, best = record["metrics"]["last"], record["metrics"]["best"]
    assert set(last) == {"step", "val_loss", "test_loss"}
    assert best["val_loss"] == min(value for _, _, value in record["curves"]["val_loss"])
    assert last["test_loss"] < 0.9 * record["curves"]["train_loss"][0][2]


@pytest.mark.parametrize(
    ("content", "message"),
    (
        (b"", "data.path: expected at least 170 characters for data.block_size=16, .* has 0"),
        (b"short", "data.path: expected at least 170 characters for data.block_size=16, .* has 5"),
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


def test_a_run_is_named_by_its_text_not_by_its_place(tmp_path, text):
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT, encoding="utf-8")
    one, same = (run_id(resolve(tmp_path, f"data.path={path}")) for path in (text, copy))
    copy.write_text(TEXT + "more", encoding="utf-8")
    other = run_id(resolve(tmp_path, f"data.path={copy}"))
    assert one == same != other
    written = charlm.identify(resolve(tmp_path, f"data.path={text}"))
    text.write_text(TEXT[::-1], encoding="utf-8")
    with pytest.raises(DataError, match="data.sha256: expected .* it is another text"):
        charlm.read(written, "cpu")


def test_line_ends_and_byte_order_marks_are_no_characters(tmp_path):
    texts = []
    for name, mark, end in (("unix", b"", b"\n"), ("windows", b"\xef\xbb\xbf", b"\r\n")):
        path = tmp_path / name
        path.write_bytes(mark + TEXT.encode().replace(b"\n", end) + (b"a line" + end) * 20)
        texts.append(charlm.read(resolve(tmp_path, f"data.path={path}"), "cpu"))
    assert texts[0].vocabulary == texts[1].vocabulary and torch.equal(texts[0].train, texts[1].train)


def test_a_named_text_is_the_same_run_wherever_it_lies(tmp_path, monkeypatch):
    path = tmp_path / "elsewhere.txt"
    path.write_text(TEXT, encoding="utf-8")
    file = data.File("tinyshakespeare.txt", "", hashlib.sha256(path.read_bytes()).hexdigest(), "")
    monkeypatch.setitem(data.FILES, "tinyshakespeare", file)
    assert run_id(resolve(tmp_path)) == run_id(resolve(tmp_path, f"data.path={path}", "data.text=python_docs"))
    with pytest.raises(DataError, match="data.sha256: expected abc, .* it is another text"):
        charlm.identify(resolve(tmp_path, f"data.path={path}", "data.sha256=abc"))


def test_a_missing_text_is_one_line_of_error(tmp_path):
    command = [sys.executable, "-m", "experiments.charlm", "profile=smoke", "logger=none", "data.path=nowhere.txt"]
    places = [f"results_dir={tmp_path}", f"output_dir={tmp_path}"]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: data.path: cannot read nowhere.txt (No such file or directory)"


def test_attention_without_positions_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="model: attention alone knows no order; model=transformer has positions"):
        settings = ("model=transformer", "model.positions=false", f"data.path={text}")
        charlm.task(resolve(tmp_path, *settings), torch.device("cpu"))


def test_pythons_own_documentation_is_a_text(tmp_path):
    """Never found by a file's name, and never the same run as Shakespeare."""
    cfg = resolve(tmp_path, "data.text=python_docs")
    text = charlm.read(cfg, "cpu")
    assert len(text.train) > 200_000 and "lambda" in "".join(text.vocabulary[i] for i in text.train.tolist())
    assert run_id(cfg) != run_id(resolve(tmp_path))


def test_heads_are_64_wide_but_four_at_least():
    heads = {dim: charlm.make("attention")(dim).heads for dim in (32, 128, 384, 768)}
    assert heads == {32: 4, 128: 4, 384: 6, 768: 12}  # nanoGPT's: 4 at 128, 6 at 384, 12 at 768


def test_scaled_models_have_as_many_parameters_as_nanogpts():
    count = {}
    for cell in grid.CELLS:
        if cell.table == "charlm":
            cfg = config.typed(cell.config("cpu"))
            model = cfg.model
            with torch.device("meta"):
                net = charlm.TokenModel(65, 65, mixer=charlm.make(**model.mixer(64)), **model.backbone(64))
            count[cell.row] = sum(p.numel() for p in net.parameters())
    assert count["Transformer"] == 804_096 and len(count) == 6
    assert all(abs(n / count["Transformer"] - 1) < 0.01 for n in count.values()), count


# Generation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recurrent model and a Transformer that saw a text of ten characters in turn."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("0123456789" * 300)
    runs = {}
    for model in ("mingru", "transformer", "minlstm", "mamba", "gru", "lstm"):
        overrides = (f"model={model}", f"data.path={folder / 'text.txt'}", "train.steps=150", "eval.interval=50")
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


def test_without_a_prompt_it_begins_with_a_line_end_or_the_texts_first_character(trained, capsys):
    """This text has no line end."""
    folder, runs = trained
    places = (f"results_dir={folder}/results", f"output_dir={folder}/outputs")
    sample.main([f"run={runs['mingru']}", *places, "tokens=5", "temperature=0"])
    assert capsys.readouterr().out[0] == "0"


@pytest.mark.parametrize("model", ("mingru", "transformer"))
def test_a_prompt_read_at_once_is_one_read_step_by_step(trained, model):
    net, vocabulary = sample.load(settings_of(trained, model))
    prompt = torch.tensor([vocabulary.index(c) for c in "0123456"])
    with torch.inference_mode():
        whole, whole_state = sample.start(net, prompt, None)
        logits, state = sample.start(net, prompt[:1], None)
        for token in prompt[1:]:
            logits, state = net.step(token[None], state)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert sample.state_bytes(state) == sample.state_bytes(whole_state)


def test_a_recurrent_state_does_not_grow(trained):
    sizes = {}
    for model in trained[1]:
        settings = settings_of(trained, model, "tokens=14", "temperature=0")
        net, _ = sample.load(settings)
        states = [state for _, state in sample.generate(net, torch.tensor([0]), settings)]
        sizes[model] = (sample.state_bytes(states[0]), sample.state_bytes(states[-1]))
    assert {model for model, (first, last) in sizes.items() if first != last} == {"transformer"}


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


def test_the_whole_text_selects_where_it_is_asked_for(tmp_path, text):
    settings = ("model=mingru", f"data.path={text}", "train.steps=60", "eval.interval=20", "eval.whole=true")
    cfg = resolve(tmp_path, *settings)
    assert charlm.run(cfg) == "done"
    record = records.read_record(records.record_path(tmp_path / "results", "charlm", run_id(cfg)))
    for which in ("last", "best"):
        values = record["metrics"][which]
        assert values["val_loss"] == values["test_loss"] != values["test_estimate"]
    assert run_id(resolve(tmp_path, *settings[:-1])) != run_id(cfg)
    paper, nanogpt = (launch.resolve("charlm", [f"profile={profile}"]) for profile in ("paper", "nanogpt"))
    assert (paper.eval.whole, paper.train.patience) == (True, 12)
    assert (nanogpt.eval.whole, nanogpt.train.patience) == (False, None)
