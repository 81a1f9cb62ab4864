"""Build the result pages from kept evidence.

    python docs/results/pages.py keep SET RUNS [NAME ...]   # copy finished runs under RUNS into data/SET
    python docs/results/pages.py build                      # fill every page of this folder again

`keep` takes what a page needs of a run: identity, configuration, provenance, result and, per
example, the columns that comparisons and studies read (`--bare`: no rows; then no paired
intervals). A page is prose with blocks between `<!-- begin KIND SET -->` and `<!-- end -->`; `build`
replaces what stands between them. KIND is

    compare    paired table                              results   one line per run
    picture    of the comparison                         made      machine, versions, date, commit
    answer, triangle, cohorts, oracle, policies, deep    a section of `reason study`
    study      its picture
    faithful             what `faithfulness.py` said of runs, kept in data/SET-faithfulness.json
    published, claims    what a paper says, and what our runs say to that; SET is a file in published/
    language             language models side by side: bits per byte, depth, operations, differences
    routing              how the learned router differs from each of its controls
    recovered            what training regains of the loss that making a model recursive costs
    levels               accuracy and depth by the steps that an answer needs
    solving              particle filtering beside its rivals, a line for each configuration
    differences          particle filtering less each rival, paired
    settings             configurations of particle filtering, each less the first
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import shutil
import sys
import time
from pathlib import Path

import language
import numpy as np
import solving
import yaml
from language import result_of

from reason import registry
from reason.errors import ConfigError, ReasonError
from reason.files import read_json, write_json
from reason.reports.comparison import as_dict, compare
from reason.reports.plots import draw_comparison
from reason.reports.study import SECTIONS, Study, studies
from reason.reports.study.claims import judge
from reason.reports.study.models import MEANS
from reason.reports.study.picture import draw_study
from reason.reports.study.views import markdown
from reason.tracking.folder import FINISHED, RunFolder

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
PUBLISHED = HERE / "published"
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
    runs = [run for run in runs if run.status == FINISHED and run.identity.get("kind") != "sweep"]
    for run in runs:
        shutil.rmtree(target / run.name, ignore_errors=True)
    for run in runs:
        place = target / run.name
        place.mkdir()
        shutil.copy(run / "env.json", place / "env.json")
        write_json(place / "result.json", read_json(run / "result.json") | {"files": {}})  # rows are cut down
        write_json(place / "run.json", {k: v for k, v in run.identity.items() if k != "argv"})
        config = run.config | {"runs": "runs"}
        for key in ("path", "items"):  # where the data lay is nobody's business; the digest says what it was
            if isinstance(config["dataset"].get(key), str):
                config["dataset"][key] = Path(config["dataset"][key]).name
        (place / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        if not bare:
            slim_rows(run, place)
        print(f"kept {run.name}", file=sys.stderr)


def slim_rows(run: RunFolder, place: Path) -> None:
    """The rows of a run with nothing but the columns of the accuracy and, on test, what a study reads.

    They are sorted by id and the ids left out: small, and nobody's name. The trivial baselines are the same
    for every run of a set: the first one has them.
    """
    import pyarrow as pa
    from pyarrow import feather

    result = result_of(run)
    (place / "rows").mkdir()
    card = registry.card("methods", result.method)
    studied = {"depth_used", *MEANS, *(c.column for c in card.cohorts)}
    least = result.curve[0]
    beside = [least.metrics[name] for name in card.beside]
    studied |= {column for m in beside for column in (m.column, m.denominator) if column}
    studied |= {c for c in feather.read_table(run / least.rows).column_names if LEVEL.fullmatch(c)}
    answers = {e.rows: {r.accuracy.column for r in e.rivals.values()} for e in result.curve}
    wanted = [(e.rows, e.accuracy, studied | answers[e.rows]) for e in result.curve]
    wanted += [(e.valid_rows, e.accuracy, set()) for e in result.curve if e.valid_rows]
    wanted += [
        (b.rows, b.accuracy, set())
        for b in result.baselines.values()
        if not any((other / b.rows).is_file() for other in place.parent.iterdir())
    ]
    for path, accuracy, more in wanted:
        own = {accuracy.column, accuracy.denominator, *(m.column for m in beside)}
        table = feather.read_table(run / path).sort_by("id")
        kept = {
            name: table.column(name) if name in own else smallest(table.column(name).to_numpy())
            for name in table.column_names
            if name in own | more
        }
        feather.write_feather(pa.table(kept), str(place / path), compression="zstd", compression_level=19)


LEVEL = re.compile(r"(correct|targets|depth)_\d+")  # columns of a task whose answers need a known depth


def smallest(values: np.ndarray) -> np.ndarray:
    """Whole numbers in as few bytes as hold them; others in half precision: only their mean is told."""
    if values.dtype.kind not in "biuf":
        return values
    if np.all(values == np.round(values)):
        return values.astype(np.min_scalar_type(int(values.max())) if values.min() >= 0 else np.int64)
    return values.astype(np.float16)


# --- build ------------------------------------------------------------------------------------------

BLOCK = re.compile(r"(<!-- begin (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.S)


def build() -> None:
    for page in sorted(HERE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]](m[3]) + m[4], text)
        page.write_text(new, encoding="utf-8")
        print(f"built {page.name}", file=sys.stderr)


def compare_block(name: str) -> str:
    (table,) = compare(_set(name), _as_trained(name))
    told = as_dict(table)
    lines = [
        f"{told['accuracy_metric']} on {told['split']}, {told['dataset']} (digest `{told['data_digest'][:12]}`), "
        f"n = {told['n']} {table.units.example}s per seed.\n",
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
        r = result_of(run)
        for e in r.curve:
            a, v, training = e.accuracy, e.valid_accuracy, r.training
            cells = [
                r.experiment, r.seed, e.depth, f"{a.value:.4f} [{a.low:.4f}, {a.high:.4f}]",
                *(f"{e.metrics[k].value:.4f}" for k in ("NDCG@20", "Recall@10", "Recall@20")),
                _number(v and v.value, 4),
                *(f"{r.baselines[k].accuracy.value:.4f}" for k in ("popularity", "successor")),
                _number(training and training.epochs, 0), f"{r.metrics['device_hours']:.3f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def picture_block(name: str) -> str:
    (table,) = compare(_set(name), _as_trained(name))
    IMAGES.mkdir(exist_ok=True)
    draw_comparison(table, IMAGES / f"{name}.png")
    return f"![{table.accuracy} against depth, device-hours and latency](../images/{name}.png)\n"


def made_block(name: str) -> str:
    runs = RunFolder.all(_set(name))
    results = [result_of(run) for run in runs]
    env = read_json(runs[-1] / "env.json")
    first, last = (time.strftime("%Y-%m-%d", time.gmtime(f(r.created for r in results))) for f in (min, max))
    commits = sorted({str(read_json(r / "env.json").get("commit") or "")[:10] for r in runs} - {""})
    versions = env.get("versions", {})
    return (
        f"{len(runs)} runs, {first}{'' if first == last else ' to ' + last}; "
        f"{', '.join(sorted({r.device_name for r in results}))}, {results[0].threads} thread(s) a run; "
        f"python {env.get('python', '')}, torch {versions.get('torch', '')}; commit {', '.join(commits) or 'unknown'}; "
        f"{_device_hours(runs):.2f} device-hours in all.\n"
    )


def _device_hours(runs: list[RunFolder]) -> float:
    """What the runs of a set took, and each model that they share once."""
    own = sum(result_of(run).metrics["device_hours"] for run in runs)
    trained = {run.identity["train_hash"] for run in runs if not run.identity["trained_by"]}
    shared = {
        run.identity["train_hash"]: result_of(run).metrics["train_device_hours"]
        for run in runs
        if run.identity["train_hash"] not in trained
    }
    return own + sum(shared.values())


@functools.cache
def _study(name: str) -> Study:
    found = studies(_set(name))
    if len(found) != 1:
        raise ConfigError(
            f"The runs of {name} cannot be ranked together: {len(found)} sets.", "Keep one in each."
        )
    return found[0]


def study_block(name: str) -> str:
    IMAGES.mkdir(exist_ok=True)
    draw_study(_study(name), IMAGES / f"{name}-study.png")
    return f"![Accuracy against mean depth, and differences by group](../images/{name}-study.png)\n"


def faithful_block(name: str) -> str:
    lines = [
        "| model | attribution | with leaving out one by one [95%] | fall without the first three, less three at random [95%] | with itself, weights scrambled [95%] |",
        "| --- | --- | --- | --- | --- |",
    ]
    judged = read_json(DATA / f"{name}-faithfulness.json")
    for one in judged:
        for how in one["deletion"]:
            cells = [
                f"{one['experiment']}, {one['depth']} steps" if how == next(iter(one["deletion"])) else "",
                how,
                *(_range(part.get(how)) for part in (one["agreement"], one["deletion"], one["scrambled"])),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    cases = " and ".join(sorted({f"{one['requests']:,}" for one in judged}))
    lines.append(
        f"\n{cases} test cases of six items or more for each model; correlations are Spearman's, means over cases."
    )
    return "\n".join(lines) + "\n"


def _range(told: dict | None) -> str:
    return f"{told['value']:+.2f} [{told['low']:+.2f}, {told['high']:+.2f}]" if told else ""


def published_block(name: str) -> str:
    paper = _published(name)
    gain = " Gain: mean over the metrics of what a column adds to the first." if paper.get("tables") else ""
    lines = [f"{paper['source']}.{gain}\n"]
    for table in paper.get("sheets", []):
        lines += [f"**{table['title']}**\n", "| " + " | ".join(table["columns"]) + " |"]
        lines += ["| --- |" + " ---: |" * (len(table["columns"]) - 1)]
        lines += [
            "| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |"
            for row in table["rows"]
        ]
        lines.append("")
    for table in paper.get("tables", []):
        first, *others = table["columns"]
        lines += [f"**{table['title']}**: {' / '.join(table['metrics'])}\n"]
        lines += ["| data | " + " | ".join([first, *(f"{c} | gain" for c in others)]) + " |"]
        lines += ["| --- | --- |" + " --- | ---: |" * len(others)]
        for data, (base, *rest) in table["rows"].items():
            cells = [data, _cell(base)]
            for values in rest:
                gain = np.mean(np.array(values) / np.array(base) - 1)
                cells += [_cell(values), f"{gain:+.1%}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| what it says of | numbers | where |", "| --- | --- | --- |"]
    lines += [f"| {s['what']} | {s['numbers']} | {s['where']} |" for s in paper["said"]]
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    return " / ".join(f"{v:.4f}".lstrip("0") for v in values)


def claims_block(name: str) -> str:
    paper = _published(name)
    claims = [{"sets": paper["sets"], **claim} for claim in paper["claims"]]
    found: dict[str, Study | str] = {}
    for where in dict.fromkeys(where for claim in claims for where in claim["sets"]):
        kept = (DATA / where).is_dir() and any((run / "rows").is_dir() for run in RunFolder.all(DATA / where))
        found[where] = _study(where) if kept else "no runs with their rows are kept"
    findings = judge(claims, found)
    lines = [
        "| claim | paper | set | here [95%] | p (Holm) | n, seeds | verdict at this size |",
        "| --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    told = {claim["id"]: claim["paper"] for claim in claims}
    shown = ""
    for f in findings:
        size = f"{f.n:,}, {f.seeds}" if f.n else ""
        own = [f.claim, told[f.claim]] if f.claim != shown else ["", ""]
        cells = [*own, f.where, f.measured, _number(f.p, 3), size, f"**{f.verdict}**"]
        lines.append("| " + " | ".join(cells) + " |")
        shown = f.claim
    tests = sum(f.p is not None for f in findings)
    lines.append(
        f"\nPaired over examples and seeds; p corrected over all {tests} findings that have one. Reproduced: the interval "
        "lies on the claimed side of 0 and p is below 0.05; contradicted: on the other side."
    )
    return "\n".join(lines) + "\n"


def _published(name: str) -> dict:
    file = PUBLISHED / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"There is no {file}.", "published NAME and claims NAME read it.")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


# --- language models ----------------------------------------------------------------------------------


BLOCKS = {
    "compare": compare_block,
    "results": results_block,
    "picture": picture_block,
    "made": made_block,
    "study": study_block,
    "faithful": faithful_block,
    "published": published_block,
    "claims": claims_block,
    **{kind: lambda name, block=block: block(_models(name)) for kind, block in language.BLOCKS.items()},
    **{
        kind: lambda name, block=block: block(RunFolder.all(_set(name)))
        for kind, block in solving.BLOCKS.items()
    },
    **{section: lambda name, section=section: markdown(_study(name), section) for section in SECTIONS},
}


def _set(name: str) -> Path:
    if not (DATA / name).is_dir():
        raise ConfigError(
            f"There is no evidence in {DATA / name}.", f"python docs/results/pages.py keep {name} runs"
        )
    return DATA / name


def _models(name: str) -> list[RunFolder]:
    return [run for run in RunFolder.all(_set(name)) if run.name in _as_trained(name)]


def _as_trained(name: str) -> list[str]:
    """The runs of a set that are judged with the default of every key of evaluation; others have tables of their own."""
    found = []
    for run in RunFolder.all(_set(name)):
        method = result_of(run).method
        Config = registry.card("methods", method).Config
        own = run.config.get(method, {})
        marked = [f for f in dataclasses.fields(Config) if f.metadata.get("evaluation")]
        if all(own.get(f.name, f.default) == f.default for f in marked):
            found.append(run.name)
    return found


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
