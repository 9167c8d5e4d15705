"""What tables say, in sentences that follow from their numbers by fixed rules. Needs no torch.

No verdict follows from a value of the paper that no source confirms.
"""

import re
from collections.abc import Callable

from experiments.grid import METRICS, TABLES, runs
from experiments.grid.selective_copy import FINAL, commonest

from .cells import Entry, Records, common_seeds, machines, seconds_a_step

HIGH = 95.0  # percent: what three layers of minGRU are to exceed
TURNED = 0.02  # nats above the lowest point of a curve; less is noise of the estimate
CHANCE = 1.0  # percentage points around an accuracy of chance, over millions of answers
NEAR = 0.05  # nats: how near to the Transformer the minimal RNNs are to come


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
    """Sentences that compare means over the curve, which are larger for a model that learns sooner."""
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
    # The best point of the mean curve has a step; the mean of the seeds' own best points lies on no curve.
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
    """The validation loss by step, mean over the seeds."""
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
    """Sentences on each model's loss minus the Transformer's, under each convention."""
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
    """Sentences on each row's best rate on validation; if it is the first or last, one beyond may be better."""
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


def parity_found(profile: str, found: list[Entry]) -> list[str]:
    """Sentences on the longest test: which models make no error, are no better than chance, or lie between."""
    accuracy, exact = METRICS["accuracy_at_65536"], METRICS["exact_at_65536"]
    said, level = [], []
    for entry in found:
        values, whole = entry.values("last", accuracy), entry.values("last", exact)
        if not values:
            continue
        right = sum(share == 100 for share in whole)
        if right:
            said.append(
                f"{entry.cell.row} answers every prefix of strings of 65,536 bits, a thousand times the longest in "
                f"training, without an error on {right} of {len(whole)} seeds."
            )
        elif max(values) < 50 + CHANCE:
            level.append(entry.cell.row)
        else:
            said.append(f"{entry.cell.row} has {min(values):.1f} to {max(values):.1f} % right at 65,536 bits.")
    if level:
        said.append(f"No better than chance at 65,536 bits (at most {50 + CHANCE:g} %): {', '.join(level)}.")
    return said


FINDINGS: dict[str, Callable[[str, list[Entry]], list[str]]] = {
    "table1_layers": layers_found,
    "table2_selective_copy": copying_found,
    "forget_bias": bias_found,
    "parity": parity_found,
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
    "parity",
    "decision_local",
    "table3_d4rl",
    *(table for table in TABLES if "learning_rate" in table),
)


def findings(table: str, profile: str, found: list[Entry]) -> list[str]:
    """Sentences by rule, over the seeds that all rows have; nothing is concluded from one seed."""
    if table not in FINDINGS or profile == "smoke":
        return []
    if table in ROWS_APART:
        return FINDINGS[table](profile, found)
    seeds = common_seeds(found)
    if len(seeds) < 2:
        return [f"The rows share {len(seeds)} seed, too few for a verdict."] if seeds else []
    return FINDINGS[table](profile, [entry.of_seeds(seeds) for entry in found])


def compared_with_paper(found: list[Entry]) -> list[str]:
    """Sentences, at the paper's scale, on whose mean ± standard deviation (a point for one run) meets the paper's."""
    judged = [e for e in found if e.done and e.paper and e.paper.confirmed and e.paper.std is not None]
    meets, apart = [], []
    for entry in judged:
        gap = abs(entry.mean() - entry.paper.value) - (entry.std() or 0) - (entry.paper.std or 0)
        (meets if round(gap, 6) <= 0 else apart).append(entry.label)
    if not judged:
        return []
    return [
        f"Mean ± standard deviation overlaps the paper's (confirmed values only): {'; '.join(meets) or 'none'}. "
        f"No overlap: {'; '.join(apart) or 'none'}."
    ]


def blank(found: list[Entry]) -> list[str]:
    names = [entry.label for entry in found if not entry.done and not entry.others]
    return [f"Not run: {'; '.join(names)}."] if names else []


def troubles(found: list[Entry]) -> list[str]:
    return [
        f"{entry.label}, seed {record['seed']} {record['status']}: {_line(record['reason'])} (`{record['run_id']}`)"
        for entry in found
        for record in entry.others
    ]


def _said(entry: Entry) -> str:
    return f"{entry.metric.format(entry.mean(), entry.std())} {entry.metric.unit} (n = {len(entry.done)})"


def _line(reason: str | None, most: int = 160) -> str:
    """The first line of a reason, safe in a markdown list; the record has the rest."""
    text = (reason or "no reason given").strip().splitlines()[0].replace("`", "'").replace("<", "&lt;")
    return text if len(text) <= most else text[: most - 1] + "…"


def times(records: Records) -> list[str]:
    """Sentences on how long a seed's runs take, by the records' seconds, with one run per core."""
    said = []
    names = {"selective_copy": "selective copying", "charlm": "character model", "decision": "decision RNNs"}
    for name, text in names.items():
        planned = [run for run in runs("cpu", 1) if run.experiment == name and not run.asked]
        done = [records[run.run_id] for run in planned if run.run_id in records]
        if done:
            minutes = sum(record["seconds"] for record in done) / 60 / max(r["hardware"]["cores"] for r in done)
            said.append(
                f"{text}: {minutes:.0f} minutes for {len(done)} of {len(planned)} runs, on {'; '.join(machines(done))}"
            )
    return said
