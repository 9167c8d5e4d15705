"""The benchmark's tables from its records: `python -m benchmarks.tables`. Needs no torch.

Reads results/bench/<device>.json; writes results/tables/bench_<part>_<device>.{md,csv} and renews the `bench` blocks of
the pages (see `scripts.pages`).
"""

import csv
import json
import re
from pathlib import Path

from scripts.pages import renew

RESULTS = Path("results")
CELL_NAMES = {"mingru_g": "minGRU", "minlstm_g": "minLSTM", "linear": "linear"}


def share(row: dict, part: str) -> float:
    """Bytes that must move, over the copy bandwidth of the same run, over the time that was taken."""
    B, T, D = row["shape"]
    forward, backward = row["bytes_per_element"]
    size = {"forward": forward, "backward": backward, "both": forward + backward}[part]
    return B * T * D * size / row["copy_bandwidth"] / (row["minrnn"][part]["min_ms"] / 1e3)


def ms(timing: dict) -> str:
    return f"{timing['min_ms']:.3g} / {timing['median_ms']:.3g}"


def peers_of(row: dict) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, dict) and name not in ("minrnn", "MinGRU")]


def kernel_line(row: dict) -> str:
    shares = ", ".join(f"{part} {share(row, part):.2f}" for part in ("forward", "backward", "both"))
    ours = row["minrnn"]["both"]
    line = f"{CELL_NAMES[row['cell']]} {shape(row['shape'])} {row['dtype']}: {ms(ours)} ms, of copy: {shares}"
    for name in peers_of(row):
        line += f"; {name} " + (row[name].get("failed") or f"{speedup(row[name]['both'], ours):.1f} x")
    return line


def layer_line(row: dict) -> str:
    ours = row["MinGRU"]
    peers = ", ".join(f"{name} {ms(row[name])} ({speedup(row[name], ours):.1f}x)" for name in peers_of(row))
    return f"{tuple(row['shape'])} {row['dtype']}: MinGRU {ms(ours)} ms; {peers}"


def precision_line(rows: list[dict]) -> str:
    return f"T={rows[0]['T']}: " + ", ".join(f"{r['dtype']} {r['backend']} {r['error']:.1e}" for r in rows)


def speedup(slow: dict, fast: dict) -> float:
    return slow["min_ms"] / fast["min_ms"]


def shape(values) -> str:
    return "(" + ", ".join(map(str, values)) + ")"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def kernel_table(rows: list[dict]) -> str:
    header = ["scan", "(B, T, D)", "dtype", "forward, ms", "backward, ms", "both, ms", "of the copy limit: forward"]
    header += ["backward", "both", "log-space takes"]
    names = sorted({name for row in rows for name in peers_of(row)} - {"log-space"})
    body = []
    for row in rows:
        times = row["minrnn"]
        cells = [CELL_NAMES[row["cell"]], shape(row["shape"]), row["dtype"], *(ms(times[p]) for p in times)]
        cells += [f"{share(row, p):.2f}" for p in times]
        for name in ("log-space", *names):
            peer = row.get(name)
            cells.append("" if peer is None else peer.get("failed") or f"{speedup(peer['both'], times['both']):.1f} x")
        body.append(cells)
    return markdown(header + [f"{name} takes" for name in names], body)


def layer_table(rows: list[dict]) -> str:
    names = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    names += [n for row in rows for n in row if isinstance(row[n], dict) and n not in names]
    names = list(dict.fromkeys(names))
    body = []
    for row in rows:
        cells = [shape(row["shape"]), row["dtype"]]
        for name in names:
            if name not in row:
                cells.append("")
                continue
            cells.append(ms(row[name]))
            if name != "MinGRU":
                cells[-1] += f" ({speedup(row[name], row['MinGRU']):.1f} x)"
            if "peak_bytes" in row[name]:
                cells[-1] += f", {row[name]['peak_bytes'] / 2**20:.0f} MiB"
        body.append(cells)
    return markdown(["(B, T, input, hidden)", "dtype", *names], body)


def precision_table(rows: list[dict]) -> str:
    dtypes = dict.fromkeys(r["dtype"] for r in rows)
    kinds = [(dtype, backend) for dtype in dtypes for backend in ("log", "auto")]
    found = {(r["T"], r["dtype"], r["backend"]): r["error"] for r in rows}
    body = [[str(T), *(f"{found[(T, *kind)]:.1e}" for kind in kinds)] for T in sorted({r["T"] for r in rows})]
    names = {"log": "log-space (the paper's)", "auto": "minrnn"}
    return markdown(["T", *(f"{dtype}, {names[backend]}" for dtype, backend in kinds)], body)


def training_table(rows: list[dict]) -> str:
    peers = sorted({name for row in rows for name in peers_of(row)} - {"scans"})
    body = []
    for row in rows:
        ours = row["minrnn"]
        hours = 400_000 * ours["median_ms"] / 3.6e6
        cells = [shape(row["shape"]), ms(ours), f"{row['scans']['min_ms'] / ours['min_ms']:.2f}", f"{hours:.1f}"]
        body.append(cells + [f"{ms(row[n])} ({speedup(row[n], ours):.1f} x)" if n in row else "" for n in peers])
    return markdown(["(batch, T)", "minGRU, ms", "of it in the scan", "400k steps, hours", *peers], body)


def language_table(rows: list[dict]) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in peers_of(row)))
    body = [
        [shape(row["shape"]), ms(row["minrnn"])]
        + [f"{ms(row[n])} ({speedup(row[n], row['minrnn']):.2f} x)" if n in row else "" for n in peers]
        for row in rows
    ]
    return markdown(["(batch, block)", "minGRU, ms", *peers], body)


def decision_table(rows: list[dict]) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in peers_of(row)))
    body = [
        [row["kind"], shape(row["shape"]), ms(row["minrnn"])]
        + [f"{ms(row[n])} ({speedup(row[n], row['minrnn']):.2f} x)" if n in row else "" for n in peers]
        for row in rows
    ]
    return markdown(["", "(batch, context)", "minGRU, ms", *peers], body)


def long_rows(part: str, rows: list[dict]):
    """One line a number: row, column, metric, value."""
    for row in rows:
        if part == "precision":
            for metric in ("error", "worst"):
                yield f"T={row['T']}", f"{row['dtype']} {row['backend']}", f"relative {metric}", row[metric]
            continue
        key = f"{row.get('cell', part.removesuffix('s'))} {shape(row['shape'])} {row['dtype']}"
        for name, value in row.items():
            if not isinstance(value, dict):
                continue
            timings = value if part == "kernels" else {"both": value}
            for phase, timing in timings.items():
                if phase == "failed":
                    yield key, name, "failed", timing
                    continue
                for metric, number in timing.items():
                    yield key, name, f"{phase} {metric}", number
        if part == "kernels":
            for phase in row["minrnn"]:
                yield key, "minrnn", f"{phase} share of copy limit", share(row, phase)
            yield key, "copy", "bytes per second", row["copy_bandwidth"]


def machine(part: dict) -> str:
    h = part["hardware"]
    gpu = f"{h['gpu']}, CUDA {h['cuda']}, triton {h['triton']}, " if "gpu" in h else ""
    state = "" if part["clean"] else " with uncommitted changes"
    return (
        f"{gpu}{h['cpu']}, {h['cores']} cores ({h['vector']}), Python {h['python']}, torch {h['torch']}, "
        f"numba {h['numba']}; commit {(part['commit'] or 'unknown')[:10]}{state}"
    )


CAPTIONS = {
    "kernels": "Scans through autograd, minimum / median of several runs. The copy limit is the fewest bytes the scan "
    "must move over the bandwidth of a large warm copy measured just before ({bandwidth} GB/s); the smaller shapes "
    "lie partly in the last cache.",
    "layers": "One layer, forward + backward to the parameters, ms, minimum / median; in brackets the ratio to MinGRU.",
    "precision": "Relative error of minGRU's states against the float64 loop (normal pre-activations, 64 channels). "
    "16 bits: inputs and result in that type; the log-space form then computes in it throughout.",
    "training": "A training step of selective copying at the paper's size (3 layers, 64 wide, expansion 6, 64 "
    "sequences in two micro-batches of 32): forward, loss, backward, clipping, AdamW; ms, minimum / median; in "
    "brackets the ratio to minGRU. minGRU-pytorch: its layer in the same backbone.",
    "decision": "A decision model (3 layers, 128 wide, three tokens a step), ms, minimum / median; in brackets the "
    "ratio to minGRU. training: a step at Decision Transformer's batch and context. policy: one more step of 60 "
    "episodes after so many, minGRU from its state, the Transformer reading all again. environment: one step of 60 "
    "Hoppers on one thread, bare with random actions, and with a policy; the Transformer's context is 20.",
    "language": "A training step of the character model at the paper's size (3 layers, 384 wide; without dropout): "
    "forward, loss, backward, clipping, AdamW; ms, minimum / median; in brackets the ratio to minGRU. minGRU-pytorch: "
    "its layer in the same backbone. Mamba has no MLP, so about half of the parameters.",
}
TABLE = {
    "kernels": kernel_table,
    "layers": layer_table,
    "precision": precision_table,
    "training": training_table,
    "language": language_table,
    "decision": decision_table,
}


def main(folder: Path = RESULTS) -> None:
    """Pages show what stands in their own results folder only."""
    target = folder / "tables"
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((folder / "bench").glob("*.json")):
        device, results = path.stem, json.loads(path.read_text())
        for part, content in results.items():
            rows = content["rows"]
            bandwidths = [row.get("copy_bandwidth", 0) / 1e9 for row in rows]
            caption = CAPTIONS[part].format(bandwidth=f"{min(bandwidths):.0f} to {max(bandwidths):.0f}")
            text = f"{caption} {machine(content)}.\n\n{TABLE[part](rows)}"
            (target / f"bench_{part}_{device}.md").write_text(text)
            with (target / f"bench_{part}_{device}.csv").open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["row", "column", "metric", "value"])
                writer.writerows(long_rows(part, rows))
            if folder == RESULTS:  # float32 only, to stay readable
                renew(f"bench:{part}_{device}", re.sub(r".*float16 \|.*\n", "", text))
    print(f"tables: {target}/bench_*")


if __name__ == "__main__":
    main()
