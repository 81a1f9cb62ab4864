"""Build the result pages from kept evidence.

    python docs/results/pages.py keep SET RUNS [NAME ...]   # copy finished runs under RUNS into data/SET
    python docs/results/pages.py build                      # fill every page of this folder again

`keep` takes what a page needs of a run: identity, configuration, provenance, result and, per
example, the id and the columns of the accuracy (`--bare`: no rows; then no paired intervals). A page
is prose with blocks between `<!-- begin KIND SET -->` and `<!-- end -->`; `build` replaces what
stands between them. KIND is `compare` (paired table), `results` (one line per run), `picture` or `made`
(machine, versions, date, commit).
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from pathlib import Path

import yaml

from reason.errors import ConfigError, ReasonError
from reason.files import read_json, write_json
from reason.reports.comparison import as_dict, compare
from reason.reports.plots import draw_comparison
from reason.tracking.folder import FINISHED, RunFolder

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
IMAGES = HERE.parent / "images"


# --- keep -------------------------------------------------------------------------------------------


def keep(name: str, root: Path, chosen: list[str], bare: bool) -> None:
    target = DATA / name
    target.mkdir(parents=True, exist_ok=True)
    runs = [RunFolder.find(c, root) for c in chosen] if chosen else RunFolder.all(root)
    sweeps = {r.name for r in runs if r.identity.get("kind") == "sweep"}
    runs = [
        r
        for r in RunFolder.all(root)
        if r.identity.get("parent") in sweeps or r.name in {x.name for x in runs}
    ]
    for run in runs:
        if run.status != FINISHED or run.identity.get("kind") == "sweep":
            continue
        place = target / run.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for file in ("env.json", "result.json"):
            shutil.copy(run / file, place / file)
        write_json(place / "run.json", {k: v for k, v in run.identity.items() if k != "argv"})
        config = run.config
        for key in ("path", "items"):  # where the data lay is nobody's business; the digest says what it was
            if isinstance(config["dataset"].get(key), str):
                config["dataset"][key] = Path(config["dataset"][key]).name
        (place / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        if not bare:
            slim_rows(run, place)
        print(f"kept {run.name}", file=sys.stderr)


def slim_rows(run: RunFolder, place: Path) -> None:
    """The rows of a run with nothing but ids and the columns of the accuracy."""
    from pyarrow import feather

    result = run.result or {}
    (place / "rows").mkdir()
    wanted = [(e[k], e["accuracy"]) for e in result["curve"] for k in ("rows", "valid_rows")]
    wanted += [(b["rows"], b["accuracy"]) for b in result["baselines"].values()]
    for path, accuracy in wanted:
        columns = ["id", accuracy["column"], *filter(None, [accuracy.get("denominator")])]
        table = feather.read_table(run / path, columns=columns)
        feather.write_feather(table, str(place / path), compression="zstd", compression_level=19)


# --- build ------------------------------------------------------------------------------------------

BLOCK = re.compile(r"(<!-- begin (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.S)


def build() -> None:
    for page in sorted(HERE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]](m[3]) + m[4], text)
        page.write_text(new, encoding="utf-8")
        print(f"built {page.name}", file=sys.stderr)


def compare_block(name: str) -> str:
    (table,) = compare(_set(name))
    told = as_dict(table)
    lines = [
        f"{told['accuracy_metric']} on {told['split']}, {told['dataset']} (digest `{told['data_digest'][:12]}`), "
        f"n = {told['n']} {table.units['example']}s per seed.\n",
        "| model | depth | seeds | accuracy [95%] | validation | difference to its reference [95%] | p (Holm) | verdict | ms p50 | device-hours |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | --- | ---: | ---: |",
    ]
    for row in told["rows"]:
        verdict = {None: "", True: "different", False: "not distinguishable"}[row["distinguishable"]]
        difference = (
            f"{row['difference']:+.4f} [{row['difference_low']:+.4f}, {row['difference_high']:+.4f}] to {row['reference']}"
            if row["difference"] is not None
            else ""
        )
        cells = [
            row["label"] + (" *" if row["chosen_on_validation"] else ""),
            "" if row["depth"] is None else row["depth"],
            len(row["seeds"]) or "",
            f"{row['accuracy']:.4f} [{row['accuracy_low']:.4f}, {row['accuracy_high']:.4f}]",
            _number(row["valid_accuracy"], 4),
            difference,
            _number(row["p_holm"], 3),
            verdict,
            _number(row["latency_p50_ms"], 2),
            _number(row["device_hours"], 3),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("\n\\* the depth that validation chooses within its model.")
    return "\n".join(lines) + "\n"


def results_block(name: str) -> str:
    lines = [
        "| run | seed | depth | NDCG@10 [95%] | NDCG@20 | Recall@10 | Recall@20 | validation NDCG@10 | popularity NDCG@10 | successor NDCG@10 | epochs | device-hours |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in RunFolder.all(_set(name)):
        r = run.result or {}
        for e in r["curve"]:
            a, m = e["accuracy"], e["metrics"]
            cells = [
                r["experiment"], r["seed"], e["depth"], f"{a['value']:.4f} [{a['low']:.4f}, {a['high']:.4f}]",
                *(f"{m[k]['value']:.4f}" for k in ("NDCG@20", "Recall@10", "Recall@20")),
                f"{e['valid_accuracy']['value']:.4f}",
                *(f"{r['baselines'][k]['accuracy']['value']:.4f}" for k in ("popularity", "successor")),
                f"{r['training']['epochs']:.0f}", f"{r['metrics']['device_hours']:.3f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def picture_block(name: str) -> str:
    (table,) = compare(_set(name))
    IMAGES.mkdir(exist_ok=True)
    draw_comparison(table, IMAGES / f"{name}.png")
    return f"![{table.accuracy} against depth, device-hours and latency](../images/{name}.png)\n"


def made_block(name: str) -> str:
    runs = RunFolder.all(_set(name))
    results = [r.result or {} for r in runs]
    env = read_json(runs[-1] / "env.json")
    first, last = (
        time.strftime("%Y-%m-%d", time.gmtime(f(r["created"] for r in results))) for f in (min, max)
    )
    commits = sorted({str(read_json(r / "env.json").get("commit") or "")[:10] for r in runs} - {""})
    versions = env.get("versions", {})
    return (
        f"{len(runs)} runs, {first}{'' if first == last else ' to ' + last}; "
        f"{', '.join(sorted({r['device_name'] for r in results}))}, {results[0]['threads']} thread(s) a run; "
        f"python {env.get('python', '')}, torch {versions.get('torch', '')}; commit {', '.join(commits) or 'unknown'}; "
        f"{sum(r['metrics']['device_hours'] for r in results):.2f} device-hours in all.\n"
    )


BLOCKS = {"compare": compare_block, "results": results_block, "picture": picture_block, "made": made_block}


def _set(name: str) -> Path:
    if not (DATA / name).is_dir():
        raise ConfigError(
            f"There is no evidence in {DATA / name}.", f"python docs/results/pages.py keep {name} runs"
        )
    return DATA / name


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    keeping = verbs.add_parser("keep")
    keeping.add_argument("set")
    keeping.add_argument("runs", type=Path)
    keeping.add_argument("names", nargs="*")
    keeping.add_argument("--bare", action="store_true")
    verbs.add_parser("build")
    said = parser.parse_args()
    try:
        if said.verb == "keep":
            keep(said.set, said.runs, said.names, said.bare)
        else:
            build()
    except ReasonError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
