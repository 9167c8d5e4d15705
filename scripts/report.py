"""The report from records alone: `python -m scripts.report`. Needs no torch.

`results/REPORT.md` has the paper's scale and profile cpu, `results/REPORT_smoke.md` profile smoke. Its verdicts follow
from the numbers by fixed rules, and never from a value of the paper that no source confirms.
"""

import re
from collections.abc import Callable
from pathlib import Path

from scripts import efficiency, efficiency_bench, efficiency_tables, summary
from scripts.pages import renew
from scripts.plan import CELLS, FINAL, METRICS, TABLES, commonest
from scripts.plan import runs as plan_runs
from scripts.tables import (
    PAPER,
    Entry,
    Records,
    caption,
    command,
    common_seeds,
    efficiency_claims,
    file_name,
    grid,
    load,
    machines,
    markdown_grid,
    measured_tables,
    notes,
    read_paper,
    results_dir_argument,
    seconds_a_step,
    write,
)

REPORTS = {"REPORT.md": ("paper", "cpu"), "REPORT_smoke.md": ("smoke",)}
PROFILE_NAMES = {"paper": "at the paper's scale", "cpu": "scaled down (profile cpu)", "smoke": "smoke test only"}
HIGH = 95.0  # percent: what three layers of minGRU are to exceed
TURNED = 0.02  # nats above the lowest point of a curve; less is noise of the estimate
NEAR = 0.05  # nats: how near to the Transformer the minimal RNNs are to come
FIGURES = (
    (
        "{table}{suffix}",
        "Test accuracy: mean and standard deviation over seeds. Hollow markers are the paper's values, drawn at the "
        "paper's scale only († unconfirmed).",
    ),
    ("{table}_accuracy{suffix}", "Validation accuracy: mean over seeds. The band spans the lowest and highest seed."),
    (
        "{table}_steps{suffix}",
        "Score of evaluations during training: mean over seeds. The band spans the lowest and highest seed.",
    ),
    ("{table}_target{suffix}", "Score reached against score asked for. On the dashed line they are equal."),
    (
        "{table}_interquartile{suffix}",
        "Interquartile mean of the scores of the last weights, with a 95 % bootstrap interval, over the datasets that "
        "every model has with all its seeds.",
    ),
    ("{table}_loss{suffix}", "Training loss: mean over seeds. The band spans the lowest and highest seed."),
)
RATES = "Best validation value of each model against its learning rate, on one seed."
LANGUAGE = (
    "Validation loss against steps and against training time without evaluations: mean over seeds. The band spans the "
    "lowest and highest seed. The vertical axis is cut."
)


# -- what was found


def layers_found(profile: str, found: list[Entry]) -> list[str]:
    said = []
    for model in dict.fromkeys(entry.cell.row for entry in found):
        mine = [entry for entry in found if entry.cell.row == model and entry.done]
        if not mine:
            continue
        deepest = mine[-1]
        verdict = "above" if deepest.mean() > HIGH else "not above"
        said.append(f"{model} with {deepest.cell.column} layers reaches {_said(deepest)}, {verdict} {HIGH:g} %.")
        if len(mine) > 1:
            rises = all(low.mean() < high.mean() for low, high in zip(mine, mine[1:], strict=False))
            order = " → ".join(f"{entry.metric.format(entry.mean())}" for entry in mine)
            numbers = ", ".join(entry.cell.column for entry in mine)
            said.append(
                f"The accuracy of {model} {'rises' if rises else 'does not rise'} with each layer ({numbers}: {order})."
            )
    return said


def copying_found(profile: str, found: list[Entry]) -> list[str]:
    said = []
    for entry in found:
        if entry.cell.row in ("No gate S4", "No gate S4D") and entry.done:
            config = entry.done[0]["config"]
            level, counting = TABLES[entry.cell.table].chance(config), commonest(config)
            verdict = "no more than" if entry.mean() <= counting else "more than"
            said.append(
                f"{entry.cell.row}, a time-invariant layer, reaches {_said(entry)}, {verdict} the {counting:.1f} % of "
                f"always naming the commonest symbol, which needs no order; chance is {level:.1f} %."
            )
    done = sorted((entry for entry in found if entry.done), key=lambda entry: -entry.mean())
    if len(done) > 1:
        names = [f"{entry.cell.row} {entry.metric.format(entry.mean())}" for entry in done]
        above = sum(entry.mean() > HIGH for entry in done)
        said.append(
            f"Above {HIGH:g} %: {', '.join(names[:above]) or 'none'}. Not above: {', '.join(names[above:]) or 'none'}."
        )
    return said


def bias_found(profile: str, found: list[Entry]) -> list[str]:
    """Compares means over the curve, which are larger for who learns sooner."""
    done = [entry for entry in found if entry.done]
    if len(done) < 2:
        return []
    curves = [[value for r in entry.done for _, _, value in r["curves"]["val_accuracy"]] for entry in done]
    means = [100 * sum(values) / len(values) for values in curves]
    rises = all(low < high for low, high in zip(means, means[1:], strict=False))
    listed = " → ".join(f"{mean:.1f} ({entry.cell.row})" for mean, entry in zip(means, done, strict=True))
    verdict = "rises with each larger bias, as in" if rises else "does not rise with each larger bias, unlike in"
    return [f"The mean accuracy over training {verdict} the paper's Figure 5: {listed} %."]


def language_found(profile: str, found: list[Entry]) -> list[str]:
    done = sorted((entry for entry in found if entry.done), key=lambda entry: entry.mean("best"))
    transformer = next((entry for entry in done if entry.cell.row == "Transformer"), None)
    if transformer is None or len(done) < 2:
        return []
    order = [f"{entry.cell.row} {entry.mean('best'):.3f}" for entry in done]
    said = [f"Models by validation loss, lowest first: {', '.join(order)}."]
    for entry in done:
        if entry.cell.row in ("minGRU", "minLSTM"):
            above = entry.mean("best") - transformer.mean("best")
            verdict = "meets" if above <= NEAR else "misses"
            said.append(
                f"{entry.cell.row} minus Transformer is {above:+.3f} nats, which {verdict} the criterion of at most "
                f"+{NEAR}."
            )
    # Of the mean curve, so that a step belongs to it: the mean of the seeds' own best points is no point of any curve.
    curve, ratios = mean_curve(transformer), []
    level = min(curve.values())
    step = first_step_at(transformer, level)
    for entry in done:
        reached = None if entry is transformer else first_step_at(entry, level)
        if reached is not None:
            ratios.append(f"{entry.cell.row} {reached:,} ({step / reached:.1f} x)")
    said.append(
        f"The Transformer's mean curve is lowest at step {step:,} ({level:.3f}). Steps in which others reach "
        f"that loss, and the Transformer's steps over theirs: {', '.join(ratios) or 'none reaches it'}."
    )
    turned = []
    for entry in done:
        values = mean_curve(entry)
        rise = values[max(values)] - min(values.values())
        if rise > TURNED:
            turned.append(f"{entry.cell.row} (by {rise:.3f})")
    listed = ", ".join(turned) or "none"
    said.append(f"Models that overfit, ending more than {TURNED} nats above their lowest point: {listed}.")
    return said + (distances(found, 0.02) if profile == "paper" else [])


def mean_curve(entry: Entry) -> dict[int, float]:
    """Validation loss by step, over the seeds."""
    curves = [{step: value for step, _, value in record["curves"]["val_loss"]} for record in entry.done]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def first_step_at(entry: Entry, level: float) -> int | None:
    return next((step for step, value in mean_curve(entry).items() if value <= level), None)


def distances(found: list[Entry], most: float) -> list[str]:
    said = []
    for entry in found:
        if entry.done and entry.paper:
            verdict = "within" if abs(entry.mean("best") - entry.paper.value) <= most else "not within"
            said.append(
                f"{entry.cell.row} reaches {entry.mean('best'):.3f}, {verdict} {most} nats of the published loss."
            )
    return said


def calibration_found(profile: str, found: list[Entry]) -> list[str]:
    said = distances(found, 0.03 if profile == "cpu" else 0.02)
    for entry in found:
        if entry.done:
            seconds = entry.done[0]["steps"] * seconds_a_step(entry.done)
            said.append(f"{entry.cell.row} trains for {seconds:.0f} s, evaluations not counted, beside other runs.")
    return said


def convention_found(profile: str, found: list[Entry]) -> list[str]:
    """What the Transformer is behind, under each convention."""
    said = []
    for row in dict.fromkeys(entry.cell.row for entry in found):
        gaps = []
        for convention in dict.fromkeys(entry.cell.column for entry in found):
            here = {entry.cell.row: entry for entry in found if entry.cell.column == convention and entry.done}
            if row != "Transformer" and {row, "Transformer"} <= set(here):
                gaps.append(f"{here[row].mean('best') - here['Transformer'].mean('best'):+.3f} ({convention})")
        if gaps:
            said.append(f"{row} minus Transformer, best validation loss in nats: {', '.join(gaps)}.")
    return said


def rates_found(profile: str, found: list[Entry]) -> list[str]:
    """The rate that is best on validation, of each row; where it is the first or last, a further one may be better."""
    said = []
    for row in dict.fromkeys(entry.cell.row for entry in found):
        mine = [entry for entry in found if entry.cell.row == row]
        if all(entry.done for entry in mine):
            chosen = best_rate(mine)
            edge = len(mine) > 2 and chosen in (mine[0].cell.column, mine[-1].cell.column)
            said.append(f"{row}: {chosen}" + (" (at the edge of the rates tried)" if edge else "") + ".")
    return said


def best_rate(of_row: list[Entry]) -> str:
    better = max if of_row[0].metric.higher_is_better else min
    return better(of_row, key=lambda entry: entry.mean("best")).cell.column


def decision_found(profile: str, found: list[Entry]) -> list[str]:
    said = []
    for dataset in dict.fromkeys(entry.cell.column for entry in found):
        mine = [entry for entry in found if entry.cell.column == dataset]
        seeds = common_seeds(mine)
        here = {entry.cell.row: entry.of_seeds(seeds) for entry in mine if entry.done}
        if len(seeds) < 2:
            said += [f"{dataset}: the models share {len(seeds)} seed, too few for a verdict."] if here else []
            continue
        judge = here.get("DT")
        for row in ("minGRU", "minLSTM"):
            if judge is None or row not in here:
                continue
            below, spread = judge.mean() - here[row].mean(), judge.std()
            verdict = "by no more than" if below <= spread else "by more than"
            verdict = "no lower" if below <= 0 else f"lower {verdict} DT's standard deviation of {spread:.1f}"
            said.append(f"{dataset}: {row} scores {here[row].mean():.1f}, DT {judge.mean():.1f}: {verdict}.")
        for row, entry in here.items():
            ways = [entry.mean("last", METRICS[name]) for name in ("score_carried", "score_window")]
            if None not in ways:
                said.append(
                    f"{dataset}: {row} scores {ways[0]:.1f} with its state carried, {ways[1]:.1f} with a context of 20."
                )
        if dataset.endswith("medium-replay"):
            for row, entry in here.items():
                targets = [(int(match[1]), key) for key in entry.done[0]["metrics"]["last"] if (match := ASKED(key))]
                got = [
                    sum(r["metrics"]["last"][key] for r in entry.done) / len(entry.done) for _, key in sorted(targets)
                ]
                verdict = "rises" if got[-1] > got[0] else "does not rise"
                steps = ", ".join(
                    f"{score} → {value:.0f}" for (score, _), value in zip(sorted(targets), got, strict=True)
                )
                said.append(
                    f"{dataset}: the score of {row} {verdict} from the lowest to the highest score asked for ({steps})."
                )
    scores = [
        (r["metrics"]["best"]["val_score"], r["metrics"]["best"]["test_score"], r["metrics"]["last"]["test_score"])
        for entry in found
        for r in entry.done
    ]
    if scores:
        chosen, best, last = (sum(values) / len(values) for values in zip(*scores, strict=True))
        said.append(
            f"Mean over all {len(scores)} runs: best evaluation in training {chosen:.1f}, its weights on fresh "
            f"episodes {best:.1f}, last weights {last:.1f}. Selection gives {chosen - best:.1f} points, better weights "
            f"{best - last:.1f}."
        )
    return said


ASKED = re.compile(r"test_score_at_(\d+)").fullmatch  # a score that was asked for


FINDINGS: dict[str, Callable[[str, list[Entry]], list[str]]] = {
    "table1_layers": layers_found,
    "table2_selective_copy": copying_found,
    "forget_bias": bias_found,
    "charlm": language_found,
    "charlm_convention": convention_found,
    "decision_local": decision_found,
    "table3_d4rl": decision_found,
    "charlm_nanogpt": calibration_found,
    "charlm_learning_rate": rates_found,
    "selective_copy_learning_rate": rates_found,
    FINAL: rates_found,
    "decision_learning_rate": rates_found,
}
# Tables whose sentences compare no rows, or find the seeds that they compare themselves.
ROWS_APART = (
    "charlm_nanogpt",
    "decision_local",
    "table3_d4rl",
    *(table for table in TABLES if "learning_rate" in table),
)


def findings(table: str, profile: str, found: list[Entry]) -> list[str]:
    """Sentences by rule, over the seeds that all rows have: nothing is concluded from one."""
    if table not in FINDINGS or profile == "smoke":
        return []
    if table in ROWS_APART:
        return FINDINGS[table](profile, found)
    seeds = common_seeds(found)
    if len(seeds) < 2:
        return [f"The rows share {len(seeds)} seed, too few for a verdict."] if seeds else []
    return FINDINGS[table](profile, [entry.of_seeds(seeds) for entry in found])


def compared_with_paper(found: list[Entry]) -> list[str]:
    """At the paper's scale: whose interval, mean ± standard deviation (a point for one run), meets the paper's."""
    judged = [e for e in found if e.done and e.paper and e.paper.confirmed and e.paper.std is not None]
    meets, apart = [], []
    for entry in judged:
        gap = abs(entry.mean() - entry.paper.value) - (entry.std() or 0) - (entry.paper.std or 0)
        (meets if round(gap, 6) <= 0 else apart).append(entry.cell.label)
    if not judged:
        return []
    return [
        f"Mean ± standard deviation overlaps the paper's (confirmed values only): {'; '.join(meets) or 'none'}. "
        f"No overlap: {'; '.join(apart) or 'none'}."
    ]


def blank(found: list[Entry]) -> list[str]:
    names = [entry.cell.label for entry in found if not entry.done and not entry.others]
    return [f"Not run: {'; '.join(names)}."] if names else []


def troubles(found: list[Entry]) -> list[str]:
    return [
        f"{entry.cell.label}, seed {record['seed']} {record['status']}: {_line(record['reason'])} "
        f"(`{record['run_id']}`)"
        for entry in found
        for record in entry.others
    ]


def _said(entry: Entry) -> str:
    spread = "" if entry.std() is None else f" ± {entry.metric.format(entry.std())}"
    return f"{entry.metric.format(entry.mean())}{spread} {entry.metric.unit} (n = {len(entry.done)})"


def _line(reason: str | None, most: int = 160) -> str:
    """The first line, safe in a list of markdown; the record has the rest."""
    text = (reason or "no reason given").strip().splitlines()[0].replace("`", "'").replace("<", "&lt;")
    return text if len(text) <= most else text[: most - 1] + "…"


def times(records: Records) -> list[str]:
    """How long the runs of a seed take, by the records' seconds, with as many at once as there are cores."""
    said = []
    names = {"selective_copy": "selective copying", "charlm": "character model", "decision": "decision RNNs"}
    for name, text in names.items():
        wanted = [run for run in plan_runs("cpu", 1) if run.experiment == name and not run.asked]
        done = [records[run.run_id] for run in wanted if run.run_id in records]
        if done:
            minutes = sum(record["seconds"] for record in done) / 60 / max(r["hardware"]["cores"] for r in done)
            said.append(
                f"{text}: {minutes:.0f} minutes for {len(done)} of {len(wanted)} runs, on {'; '.join(machines(done))}"
            )
    return said


# -- the page


def section(folder: Path, table: str, profile: str, found: list[Entry]) -> str:
    own_scale = profile != "paper" and profile in TABLES[table].published_scale
    parts = [
        f"## {TABLES[table].title}" + ("" if own_scale else f", {PROFILE_NAMES[profile]}"),
        caption(table, profile, found),
        markdown_grid(*grid(table, profile, found)),
        " ".join(notes(found)),
    ]
    said = findings(table, profile, found)
    said += compared_with_paper(found) if profile == "paper" else []
    said += blank(found)
    parts.append(_list(said))
    failures = troubles(found)
    if failures:
        parts.append("Failed or diverged:\n\n" + _list(failures))
    parts.append(figures(folder, table, profile, ""))
    parts.append(
        runs(profile, found) + f"\n\nAs data: [{file_name(table, profile)}.csv](tables/{file_name(table, profile)}.csv)"
    )
    return "\n\n".join(filter(None, parts))


def figures(folder: Path, table: str, profile: str, place: str) -> str:
    """Those of a table that were drawn, each with its caption; `place` stands before their path."""
    suffix, shown = "" if profile == "paper" else f"_{profile}", []
    for name, text in FIGURES:
        path = f"figures/{name.format(table=table, suffix=suffix)}.png"
        if (folder / path).exists():
            text = RATES if TABLES[table].column == "learning rate" else text
            text = LANGUAGE if METRICS["val_loss_nats"].key in _metrics(table) and "_loss" in path else text
            shown.append(f"![{TABLES[table].title}]({place}{path})\n\n*{text}*")
    return "\n\n".join(shown)


def _metrics(table: str) -> set[str]:
    return {METRICS[cell.metric].key for cell in CELLS if cell.table == table}


def runs(profile: str, found: list[Entry]) -> str:
    """The command of each row and the records that it gave, by seed."""
    lines, count = [], 0
    for entry in found:
        done = entry.done + entry.others
        count += len(done)
        links = [
            f"[{record['run_id']}](runs/{record['experiment']}/{record['run_id']}/record.json) (seed {record['seed']}, "
            f"{record['status']})"
            for record in sorted(done, key=lambda record: record["seed"])
        ]
        seed = next(iter(entry.cell.seeds or (0,)))
        lines.append(f"- {entry.cell.label}: `{entry.cell.command(profile, seed)}`: {', '.join(links) or 'not run'}")
    return f"<details><summary>Commands and runs ({count})</summary>\n\n" + "\n".join(lines) + "\n\n</details>"


def made_with(records: list[dict]) -> str:
    versions = {}
    for record in records:
        for name, version in (record.get("versions") or {}).items():
            if version is not None:
                versions.setdefault(name, set()).add(version)
    commits = {(record.get("git") or {}).get("commit") or "unknown" for record in records}
    dirty = sum(not (record.get("git") or {}).get("clean") for record in records)
    hours = sum(record.get("seconds") or 0 for record in records) / 3600
    listed = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
    return (
        f"{len(records)} runs, {hours:.1f} hours in all, on {'; '.join(machines(records))}. "
        f"{listed or 'Versions unknown'}. Commits: {', '.join(f'`{commit[:10]}`' for commit in sorted(commits))}"
        + (f"; {dirty} runs from a working tree with changes not committed" if dirty else "")
        + "."
    )


def page(results_dir: str | Path, profiles: tuple[str, ...], records: Records, paper: Path) -> str | None:
    """None where there is no record of these profiles."""
    chosen = {name: record for name, record in records.items() if record["profile"] in profiles}
    sections = list(measured_tables(chosen, paper))
    shown = {r["run_id"]: r for _, _, found in sections for entry in found for r in (*entry.done, *entry.others)}
    measured = {key: parts for key, parts in efficiency.load(results_dir).items() if key[0] in profiles}
    if not shown and not measured:
        return None
    shown |= {part.record["run_id"]: part.record for parts in measured.values() for part in parts.values()}
    parts = [
        "# Results",
        "`make report` writes this page from the records in `runs/`. Fixed rules turn their numbers into verdicts.",
        made_with(list(shown.values())),
    ]
    parts += [section(Path(results_dir), *table) for table in sections]
    parts += [efficiency_section(Path(results_dir), *key, found, paper) for key, found in measured.items()]
    return "\n\n".join(parts) + "\n"


def efficiency_section(folder: Path, profile: str, machine: str, parts: dict[str, efficiency.Part], paper: Path) -> str:
    ending = efficiency.slug(profile, machine)
    said = [f"## Efficiency on {machine}" + ("" if profile != "smoke" else f", {PROFILE_NAMES[profile]}")]
    if "train" in parts:
        said.append(efficiency_claims(parts, read_paper(paper)).strip())
    found = efficiency.findings(parts) if profile != "smoke" else []
    said.append(_list(found + efficiency.left_out(parts)))
    said.append(efficiency_figures(folder, ending, parts, ""))
    for part in parts.values():
        said.append(efficiency_tables.caption(part) + "\n\n" + markdown_grid(*efficiency_tables.grid(part)))
    records = [
        f"[{part.record['run_id']}](runs/efficiency/{part.record['run_id']}/record.json)" for part in parts.values()
    ]
    said.append(f"Records: {', '.join(records)}. As data: {as_data(parts, ending)}")
    return "\n\n".join(filter(None, said))


def efficiency_figures(folder: Path, ending: str, parts: dict[str, efficiency.Part], place: str) -> str:
    shown = []
    for name, (part, text) in efficiency.FIGURES.items():
        path = f"figures/efficiency_{name}_{ending}.png"
        if part in parts and (folder / path).exists():
            shown.append(f"![{text}]({place}{path})\n\n*{text} {efficiency_tables.caption(parts[part])}*")
    return "\n\n".join(shown)


def blocks(results_dir: str | Path, paper: Path = PAPER) -> dict[str, str]:
    """What the pages show, by the names of their marks; those of docs/ find figures in ../results."""
    folder, place = Path(results_dir), f"../{results_dir}/"
    records = load(folder)
    found = {"found:times": _list(times(records))} | summary.blocks(folder, paper)
    for table, profile, cells in measured_tables(records, paper):
        name = file_name(table, profile)
        found[f"found:{name}"] = _list(findings(table, profile, cells))
        found[f"figure:{name}"] = figures(folder, table, profile, place)
    for key, parts in efficiency.load(folder).items():
        name = f"efficiency_{efficiency.slug(*key)}"
        found[f"found:{name}"] = _list(efficiency.findings(parts))
        found[f"figure:{name}"] = efficiency_figures(folder, efficiency.slug(*key), parts, place)
    return found


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def as_data(parts: dict[str, efficiency.Part], ending: str) -> str:
    files = [name for name, part in parts.items() if part.kind in efficiency_bench.GRIDS]
    files = ([""] if len(files) < len(parts) else []) + files
    return ", ".join(f"[{name or 'csv'}](tables/efficiency_{name and name + '_'}{ending}.csv)" for name in files)


def write_all(results_dir: str | Path, paper: Path = PAPER) -> list[Path]:
    records, written = load(results_dir), []
    for name, profiles in REPORTS.items():
        content = page(results_dir, profiles, records, paper)
        if content is not None:
            path = Path(results_dir) / name
            write(path, content)
            written.append(path)
    return written


def main() -> None:
    """Pages show what was found in their own results folder."""
    results_dir = results_dir_argument(__doc__.splitlines()[0])
    for path in write_all(results_dir):
        print(path)
    if results_dir == "results":
        for name, text in blocks(results_dir).items():
            renew(name, text)


if __name__ == "__main__":
    command(main)
