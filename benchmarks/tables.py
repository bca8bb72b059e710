"""Tables and sentences with figures in README.md and docs/, and compare.md with its plots, written from the results in benchmarks/results/.

    python benchmarks/tables.py            # writes what is between the markers
    python benchmarks/tables.py --check    # writes nothing; exit status 1 if a page is not what the results give

A page has `<!-- table: NAME -->` and `<!-- end -->` on lines of their own; NAME is one of `TABLES` here.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.study.lines import read_lines  # noqa: E402
from benchmarks.study.plan import Study, best_weight, read_study  # noqa: E402
from benchmarks.study.tables import (  # noqa: E402
    OURS,
    by_place,
    collect,
    difference_text,
    lines_in,
    markdown,
    paired_difference,
    pooled,
    rows_of,
    sections,
)

MARKED = re.compile(r"^<!-- table: (?P<name>\S+) -->\n(?P<body>.*?)^<!-- end -->$", re.M | re.S)
MARKER = re.compile(r"^<!-- (?:table: \S+|end) -->$", re.M)

DUBAI = {  # method of dubai.json: how a reader calls it
    "none": "student alone",
    "default": "+ the default (`drd_channels drd_classes`)",
    "drd_3_3": "+ the plain form (`drd`)",
    "logit": "+ logit distillation",
    "drd_3_3_logit": "+ the plain form and logit distillation",
}
CHOICE = {
    "none": "student alone",
    "drd_3_3": "relation weights 3 and 3 (the default of `drd`)",
    "drd_10_10": "10 and 10",
    "drd_10_0": "10 and 0",
    "drd_10_10_after_relu": "10 and 10, after the ReLU",
}
RELATIONS = {
    "spatial cosine": "spatial `cosine`",
    "spatial cosine, plain": "its plain definition",
    "bare products": "the bare matrix products of the identity",
    "spatial attention": "spatial `attention`",
    "spatial attention, plain": "its plain definition",
    "channel cosine": "channel `cosine`, projected",
    "channel cosine, plain": "its plain definition",
    "SKD pair-wise": "SKD pair-wise (max-pooled 2 x 2)",
    "IFVD": "IFVD",
    "CIRKD mini-batch": "CIRKD mini-batch",
    "ICKD": "ICKD",
}


def read(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head: list[str], rows: list[list], text_columns: int = 1) -> str:
    """A Markdown table; the columns after the first ones are numbers and stand on the right."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
    lines = (f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))
    return "\n".join(re.sub(r"\|  (?=\|)", "| ", line) for line in lines)


def listed(values, form: str = ".3f") -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def between(values, form: str = ".2f") -> str:
    values = list(values)
    return f"{min(values):{form}} to {max(values):{form}}"


def demo() -> str:
    found = read("demo")["demo"]
    rows = [
        [
            row["model"],
            f"{row['parameters']:,}",
            *(f"{row[key]:.3f}" for key in ("mean_iou", "mean_f1", "overall_accuracy")),
            f"{row['ms_per_tile']:.1f}",
        ]
        for row in found["rows"]
    ]
    head = ["model", "parameters", "mIoU", "mF1", "overall accuracy", "ms per tile"]
    return f"{table(head, rows)}\n\n({found['tiles']}; {found['seconds'] / 60:.0f} minutes in all on CPU.)"


def demo_seeds() -> str:
    found = read("demo")
    alone, distilled = (
        {run["seed"]: run["mean_iou"] for run in found["runs"] if run["method"] == method}
        for method in ("student alone", "distilled student")
    )
    gains = [distilled[seed] - alone[seed] for seed in alone]
    means = [found["means"][method]["mean_iou"] for method in ("student alone", "distilled student")]
    return (
        f"Of {len(gains)} seeds the distilled student is ahead with {sum(gain > 0 for gain in gains)}: "
        f"{listed(gains, '+.3f')} mIoU; on average {means[1]:.3f} against {means[0]:.3f}."
    )


def dubai_scores(method: str, key: str = "test_mean_iou") -> list[float]:
    return [run[key] for run in read("dubai")["runs"] if run["method"] == method]


def dubai() -> str:
    found = read("dubai")
    teacher = found["teacher"]
    seeds = list(dict.fromkeys(run["seed"] for run in found["runs"]))
    rows = [
        [
            "teacher",
            f"{teacher['num_parameters']:,}",
            f"{teacher['test_mean_iou']:.3f}",
            "",
            f"{teacher['test_overall_accuracy']:.3f}",
        ]
    ]
    for method, name in DUBAI.items():
        scores = dubai_scores(method)
        accuracy = statistics.mean(dubai_scores(method, "test_overall_accuracy"))
        parameters = next(run["num_parameters"] for run in found["runs"] if run["method"] == method)
        rows.append([name, f"{parameters:,}", listed(scores), f"{statistics.mean(scores):.3f}", f"{accuracy:.3f}"])
    seeds = ", ".join(map(str, seeds))
    return table(["", "parameters", f"test mIoU, seeds {seeds}", "mean", "test overall accuracy, mean"], rows)


def dubai_findings() -> str:
    alone, alone_there = dubai_scores("none"), dubai_scores("none", "validation_mean_iou")

    def gains(method: str) -> list[float]:
        return [ours - theirs for ours, theirs in zip(dubai_scores(method), alone, strict=True)]

    def finding(method: str) -> str:
        there = dubai_scores(method, "validation_mean_iou")
        ahead = sum(ours > theirs for ours, theirs in zip(there, alone_there, strict=True))
        return (
            f"changes this student by {statistics.mean(gains(method)):+.3f} mIoU on the test areas on average; with the single seeds "
            f"by {listed(gains(method), '+.3f')}. On the validation area, the strongest change of domain, it is ahead with {ahead} "
            f"of {len(there)} seeds ({listed(there)} against {listed(alone_there)})."
        )

    logit, both = (statistics.mean(gains(method)) for method in ("logit", "drd_3_3_logit"))
    return (
        f"- The default {finding('default')}\n- The plain form {finding('drd_3_3')}\n- Logit distillation at its usual weight "
        f"changes it by {logit:+.3f} on average, both together by {both:+.3f}."
    )


def dubai_choice() -> str:
    scores = {run["method"]: run["validation_mean_iou"] for run in read("dubai_choice")["runs"]}
    rows = [[name, f"{scores[method]:.3f}"] for method, name in CHOICE.items()]
    return table(["settings", "validation mIoU, seed 0"], rows)


def relations_row(method: str, size: int) -> dict:
    return next(row for row in read("relations")["rows"] if (row["method"], row["size"]) == (method, size))


def relations() -> str:
    sizes = (64, 96, 128)
    rows = []
    for method, name in RELATIONS.items():
        found = [relations_row(method, size) for size in sizes]
        rows.append(
            [name, *(f"{row['milliseconds']:.0f} ms" for row in found), f"{found[-1]['peak_megabytes']:.0f} MB"]
        )
    return table(["", *(f"{size} x {size}" for size in sizes), "peak memory at 128 x 128"], rows)


def relations_findings() -> str:
    cosine = {size: relations_row("spatial cosine", size) for size in (8, 12, 16, 24, 32, 64, 96, 128, 256)}
    attention = {
        size: relations_row("spatial attention", size)["times_plain"] for size in (8, 12, 16, 24, 32, 64, 96, 128)
    }
    growth = cosine[256]["milliseconds"] / cosine[128]["milliseconds"]
    bare = between(cosine[size]["times_bare"] for size in (64, 96, 128, 256))
    return (
        f"- `cosine` is {between((cosine[size]['times_plain'] for size in (64, 96, 128)), '.0f')} times as fast as its plain "
        f"definition at 64 x 64 to 128 x 128, and takes {bare} times its bare products from 64 x 64 on.\n"
        f"- 256 x 256 takes {growth:.1f} times as long as 128 x 128.\n"
        f"- `attention` is {between((attention[size] for size in (64, 96, 128)), '.1f')} times as fast as its plain "
        "definition at these sizes.\n"
        f"- On small maps: `cosine` {cosine[8]['times_plain']:.1f} times at 8 x 8 and "
        f"{between(cosine[size]['times_plain'] for size in (12, 16, 24, 32))} at 12 x 12 to 32 x 32, `attention` "
        f"{attention[8]:.1f} and {between(attention[size] for size in (12, 16, 24, 32))}."
    )


ALIGNED = {
    "spatial aligned": "spatial, aligned",
    "spatial aligned, plain": "its plain definition",
    "bare products": "the bare matrix products of the identity",
    "channel aligned": "channel, aligned, projected",
    "channel aligned, plain": "its plain definition",
    "bare products, projection": "the bare products of the projection",
}


def relations_aligned() -> str:
    found = read("relations_aligned")
    rows = {(row["method"], row["size"]): row for row in found["rows"]}
    sizes = sorted({size for _, size in rows})
    body = [
        [
            name,
            *(f"{rows[method, size]['milliseconds']:.0f} ms" for size in sizes),
            f"{rows[method, sizes[-1]]['peak_megabytes']:.0f} MB",
        ]
        for method, name in ALIGNED.items()
    ]
    spatial, channel = ([rows[f"{kind} aligned", size] for size in sizes] for kind in ("spatial", "channel"))
    head = ["", *(f"{size} x {size}" for size in sizes), f"peak memory at {sizes[-1]} x {sizes[-1]}"]
    return (
        f"{table(head, body)}\n\n({found['batch']} images, {found['threads']} CPU cores.) The spatial distance is "
        f"{between((row['times_plain'] for row in spatial), '.1f')} times as fast as its plain definition and takes "
        f"{between(row['times_bare'] for row in spatial)} times its bare products, that of the channels "
        f"{between((row['times_plain'] for row in channel), '.1f')} and {between(row['times_bare'] for row in channel)}."
    )


def share(name: str) -> str:
    percent = 100 * read("step")["share_of_teacher_and_student"][name]
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %" if percent >= 0.1 else "less than 0.1 %"


def step() -> str:
    milliseconds = read("step")["milliseconds"]
    return table(["", "ms", "of teacher and student"], [[n, f"{ms:.1f}", share(n)] for n, ms in milliseconds.items()])


def step_findings() -> str:
    found = read("step")
    own_grid = share("DRD, student's own grid")
    models = sum(found["milliseconds"][name] for name in ("teacher, forward", "student, step"))
    return (
        f"In a training step of a SegFormer of B0's size under one of B2's on {found['size']} x {found['size']} pixels the "
        f"default (`drd_channels drd_classes`) adds {share('DRD, drd_channels and drd_classes')}, the "
        f"plain form (`drd`) {share('DRD, plain form')} to the time of teacher and student "
        f"({found['milliseconds']['DRD, plain form']:.0f} ms on top of {models:.0f} ms, {found['threads']} CPU cores). "
        f"Written plainly, as public code is, SKD pair-wise adds {share('SKD pair-wise')}, IFVD {share('IFVD')}, ICKD {share('ICKD')}, channel-wise distillation of "
        f"features {share('CWD, features')}; AT, SP and losses of class scores are as cheap ({share('AT')}, {share('SP')}, {share('pixel KD (PixelLogitLoss)')}). On the student's own grid of "
        f"{found['size'] // 4} x {found['size'] // 4} the loss adds {own_grid}."
    )


def data() -> str:
    found = read("data")
    seconds, tiles = found["conversion_seconds"], found["assumed_h100"]["tiles_a_second"]
    return (
        f"One {found['side']} x {found['side']} RGB tile with its colour label becomes 512-pixel tiles in "
        f"{seconds['package']:.1f} s on one core: {found['times_faster_than_plain']:.1f} times faster than the plain recipe "
        "(Pillow, one comparison for each class, PNG at its default settings), "
        f"{found['times_floor']:.2f} times the time of decoding and encoding alone, labels "
        f"{'byte-exact' if found['labels_byte_exact'] else 'NOT byte-exact'}.\n\n"
        "In training, decoding and the full augmentation of a 512-pixel tile take "
        f"{found['feeding_milliseconds']['package']:.1f} ms, {found['tiles_a_second_a_core']:.0f} tiles a second and core, "
        f"{found['times_pillow_and_numpy']:.1f} times the rate of the same steps in Pillow and NumPy; 16 cores then give "
        f"{16 * found['tiles_a_second_a_core']:.0f} tiles a second. An H100 that trains a SegFormer B0 at "
        f"{found['assumed_h100']['utilisation']:.0%} of its nominal {found['assumed_h100']['peak_flops'] / 1e12:.0f} TFLOPS, "
        f"an assumption, would take {tiles['student alone']}, and {tiles['distillation from B2']} when a B2 teaches."
    )


def metrics() -> str:
    found = read("metrics")
    counted = {"SegmentationMetrics": "this package", "mean_iou form": "the form of `mean_iou`"}
    times = [row["times_peer"] for row in found["rows"] if row["method"] == "SegmentationMetrics"]
    rows = [
        [counted[row["method"]], row["labels"], row["type"], f"{row['milliseconds']:.0f} ms"]
        for row in found["rows"]
        if row["method"] in counted
    ]
    grown = {row["method"]: row for row in found["memory"]}
    ours, theirs = grown["SegmentationMetrics in evaluate"], grown["mean_iou in evaluate"]
    return (
        f"{table(['', 'classes', 'ids', 'time'], rows, text_columns=3)}\n\n"
        f"(A batch of {' x '.join(map(str, found['batch']))} pixels, {found['threads']} thread.) Counting is "
        f"{between(times, '.0f')} times as fast. In `evaluate` {ours['tiles']:,} tiles take {ours['peak_megabytes']:.0f} MB of "
        f"memory and {ours['disk_megabytes']:.0f} MB of disk; `mean_iou` takes {theirs['peak_megabytes']:.0f} MB and "
        f"{theirs['disk_megabytes']:.0f} MB for {theirs['tiles']}."
    )


def inference() -> str:
    found = read("inference")
    time, exact = found["time"], found["exactness"]
    memory = ", ".join(f"{row['host_bytes'] / 1e6:.0f} MB at {row['size']} x {row['size']}" for row in found["memory"])
    agree = found["agreement"]["by_tile"][str(found["tile"])]
    return (
        f"- A {time['size']} x {time['size']} raster takes {time['seconds']:.0f} s on {found['threads']} CPU cores, "
        f"{time['ratio']:.2f} times the bare forward passes of the same windows.\n"
        f"- Peak memory above the loaded model: {memory}.\n"
        f"- A model whose answer depends on each pixel alone: {exact['other_class']} of {exact['pixels']:,} pixels get another "
        f"class than without windows. A real student agrees with one pass over the whole image on {agree:.1%} of the pixels."
    )


def layout() -> str:
    found = read("layout")
    rows = [
        [
            row["model"],
            row["pass"],
            row["type"],
            *(f"{ms:.0f} ms" for ms in row["milliseconds"].values()),
            f"{row['ratio']:.2f}",
        ]
        for row in found["rows"]
    ]
    head = ["", "pass", "numbers", "usual order", "channels last", "times as fast"]
    return (
        f"{table(head, rows, text_columns=3)}\n\n(Batches of {found['batch_size']} of {found['size']} x {found['size']} "
        f"pixels, {found['threads']} CPU cores.)"
    )


OF_FEATURES = (
    "skd",
    "ifvd",
    "cwd",
    "at",
    "fitnet",
    "cirkd",
    "mgd",
    "afdcd",
    "ickd",
    "sp",
)  # these read no class scores


def study_lines(study: Study, any_steps: bool = False) -> list[dict]:
    """The finished runs of a study, with its own number of steps or with any; those that diverged are left out."""
    return [
        line
        for line in read_lines(ROOT / "benchmarks/results/compare.jsonl")
        if line["study"] == study.name
        and (any_steps or line.get("study_steps", study.steps) == study.steps)
        and line.get("test_mean_iou") is not None
    ]


def published() -> Study:
    return read_study(ROOT / "benchmarks/study/dubai_published.yaml")


def scores_by(lines: list[dict], *keys: str) -> dict:
    """{values of the keys: {(fold, seed): test mIoU}}."""
    scores = {}
    for line in lines:
        scores.setdefault(tuple(line[key] for key in keys), {})[line["fold"], line["seed"]] = line["test_mean_iou"]
    return scores


def compared_lines() -> list[dict]:
    """The lines of all pairs together, as `pooled` has them: every method with its own weight, none that was chosen."""
    ((_, lines),) = pooled([line for line in study_lines(published()) if not line.get("tuned_on")])
    return lines


def compared() -> tuple[list[dict], dict[str, dict]]:
    """Rows over all pairs, and {pair: {method: row}}, of the runs of `compared_lines`."""
    lines = [line for line in study_lines(published()) if not line.get("tuned_on") and line["stage"] == "compare"]
    of_pairs = sections(lines)
    of_pairs.sort(key=lambda section: len(section[1]))  # where a pair ran in several ways, the one with the most runs
    rows = {group[0]["pair"]: {row["method"]: row for row in rows_of(group)} for _, group in of_pairs}
    return rows_of(compared_lines()), dict(sorted(rows.items()))


def compare() -> str:
    """Gain of every method over the student alone, for each pair and over all, and how far ours is ahead of it.

    All are differences of runs with the same pair, fold and seed. Methods have run on different ones, so that the lead over a
    method stands beside that over the student alone in the same runs.
    """
    everything, found = compared()
    scores = {method: runs for (method,), runs in scores_by(compared_lines(), "method").items()}

    def behind(row: dict) -> float:
        return row["behind"][0] if row["behind"] else 0.0

    rows = []
    for row in sorted((row for row in everything if row["gain"]), key=behind):
        gains = [of_pair.get(row["method"], {}).get("gain") for of_pair in found.values()]
        in_same = {run: score for run, score in scores[OURS].items() if run in scores[row["method"]]}
        same = None if row["method"] == OURS else paired_difference(in_same, scores["none"])
        shown = "" if same is None else f"{100 * same[0]:+.1f}"
        rows.append([f"`{row['method']}`", *map(_difference, [*gains, row["gain"], row["behind"]]), shown])
    pairs = (f"gain, {_arrow(pair)}" for pair in found)
    head = ["method", *pairs, "gain, all", f"lead of `{OURS}`", "its lead over the student alone in these runs"]
    return table(head, rows)


def compare_scores() -> str:
    """Mean scores of the student alone and ours, for each pair, with the number of their runs."""
    _, found = compared()
    rows = [
        [
            _arrow(pair),
            *(
                f"{100 * methods[n]['test']:.1f} ({methods[n]['runs']})" if n in methods else ""
                for n in ("none", OURS)
            ),
        ]
        for pair, methods in found.items()
    ]
    return table(["test mIoU in percent (runs)", "student alone", f"`{OURS}`"], rows)


def tuned() -> tuple[list[dict], dict, float | None]:
    """Of each method the weight that was chosen and its runs with that one, {(fold, seed): test mIoU}.

    Where the weight of its paper was chosen, the runs with that one count. Beside them {method: runs} of those that name no
    weight, and the validation score of the student alone where the weights were chosen, None where it did not run there.
    """
    study = read_study(ROOT / "benchmarks/study/dubai_tuned.yaml")
    of_pairs = [
        {**line, "fold": f"{line['pair']} {line['steps']} {line['fold']}"}
        for line in study_lines(study)
        if line["pair"]
    ]
    scores, tried, rows = scores_by(of_pairs, "method", "weight"), {}, []
    here = study.tuned_on, study.tuning["fold"], study.tuning["steps"]
    for line in read_lines(ROOT / "benchmarks/results/compare_tuning.jsonl"):
        if line["study"] == study.name and "command" in line and (line["pair"], line["fold"], line["steps"]) == here:
            tried.setdefault((line["method"], line["weight"]), {})[line["seed"]] = line.get("validation_mean_iou")

    def of_seeds(name: str, weight: float | None) -> list[float | None] | None:  # None: not all of them ran
        found = tried.get((name, weight), {})
        seeds = study.tuning["seeds"]
        return [found[seed] for seed in seeds] if found.keys() >= {*seeds} else None

    for method in study.methods.values():
        ran = {weight: of_seeds(method.name, weight) for weight in sorted(method.weights)}
        weight, means = best_weight({w: scores for w, scores in ran.items() if scores})
        if weight is None:
            continue
        published = weight == method.published
        runs = scores.get((method.name, None if published else weight), {})
        rows.append(
            {"method": method.name, "weight": weight, "published": published, "validation": means, "runs": runs}
        )
    own = {name: runs for (name, weight), runs in scores.items() if weight is None}
    alone = of_seeds("none", None)
    return rows, own, statistics.mean(alone) if alone else None


def compare_tuned() -> str:
    """Of each method the weight that was chosen, its gain with that one, and the lead of ours: shipped, and chosen likewise.

    The least lead first, then those without runs.
    """
    found, own, alone = tuned()
    ours, rows = next((row["runs"] for row in found if row["method"] == OURS), {}), []
    for row in found:
        tried, weight, runs, method = row["validation"], row["weight"], row["runs"], row["method"]
        shown = [f"{w:g}: {'diverged' if mean is None else f'{100 * mean:.1f}'}" for w, mean in tried.items()]
        end = ", the lowest" * (weight == min(tried)) + ", the highest" * (weight == max(tried))
        note = f"{weight:g}{' (published)' * row['published']}{end}"
        change = None if row["published"] else paired_difference(runs, own.get(method, {}))
        lead, gain = paired_difference(own[OURS], runs), paired_difference(runs, own["none"])
        likewise = None if method == OURS else paired_difference(ours, runs)
        differences = map(_difference, (change, gain, lead, likewise))
        rows.append((math.inf if lead is None else lead[0], [f"`{method}`", ", ".join(shown), note, *differences]))
    rows = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    if alone is not None:
        rows.append(["student alone", f"{100 * alone:.1f}", *[""] * 5])
    head = ["method", "validation mIoU by weight", "chosen", "change from the published weight"]
    return table(
        head + ["gain over the student alone", f"lead of `{OURS}`", "its lead with the weight chosen so"],
        rows,
        text_columns=3,
    )


def compare_tuned_findings() -> str:
    """Where the choice ended: methods with another weight than the published one, of no help, or at the end of what was tried."""
    found, _, alone = tuned()
    rows = [row for row in found if not row["method"].startswith("drd")]
    changed = sum(not row["published"] for row in rows)
    lowest = [f"`{row['method']}`" for row in rows if row["weight"] == min(row["validation"])]
    no_help = [f"`{row['method']}`" for row in rows if row["validation"][row["weight"]] <= (alone or 0)]
    return (
        f"Of {len(rows)} methods of other papers {changed} then have another weight than the published one."
        + f" On the areas of the choice {', '.join(no_help)} are not ahead of the student alone with any weight."
        * bool(no_help)
        + f" Of {', '.join(lowest)} the lowest weight tried was the best: the smaller, the nearer to the student alone."
        * bool(lowest)
    )


def compare_ablations() -> str:
    """Variants of the default and of the other forms of DRD: each set against the form that it varies, run by run."""
    study = published()
    (pair,) = study.ablation_of["pairs"]
    lines = [line for line in study_lines(study) if line["pair"] == pair and not line.get("tuned_on")]
    scores, variants = scores_by(lines, "method"), {line["method"]: line for line in lines}
    rows = []
    for name in ("drd_channels", "drd_classes", *study.ablations):
        if name not in variants:
            continue
        line, weak, share = variants[name], "", ""
        if not line["alone"] and line["teacher"] != study.pairs[pair].teacher:
            weak = f", teacher `{line['teacher']}`"
        if line["labelled"] != 1:
            share = f", {line['labelled']:.0%} of labels"
        alone = f"none_{name.rpartition('_')[2]}" if share else "none"
        starts = {"default": OURS, "none": "none", "drd_aligned": "drd_aligned", "drd": "drd"}
        base = OURS if name in study.methods else next(starts[s] for s in starts if name.startswith(s))
        gain = None if name == alone else paired_difference(scores[name,], scores.get((alone,), {}))
        change = paired_difference(scores[name,], scores.get((base,), {}))
        variant = ("student alone" if line["alone"] else f"`{line['options']}`") + weak + share
        rows.append([variant, _difference(gain), f"`{base}`", _difference(change)])
    return table(["variant", "gain over the student alone", "against", "change"], rows)


def often(runs: dict[str, dict]) -> list[str]:
    """The methods that ran at least half as often as the most frequent one: a single run is no rival."""
    most = max(map(len, runs.values()))
    return [method for method, of_method in runs.items() if 2 * len(of_method) >= most]


def compare_rivals() -> str:
    """Which methods count in the summary, and where the others are beside the nearest of those, in the runs that both have."""
    parts = []
    own = {method: runs for (method,), runs in scores_by(compared_lines(), "method").items()}
    published = {name: runs for name, runs in own.items() if not name.startswith(("drd", "none"))}
    chosen = {row["method"]: row["runs"] for row in tuned()[0] if row["method"] in published}
    for runs, weights in ((published, "published"), (chosen, "chosen")):
        ran = {name: of_method for name, of_method in runs.items() if of_method}
        rivals = sorted(often(ran), key=lambda rival: paired_difference(own[OURS], ran[rival])[0])
        behind = {m: paired_difference(ran[rivals[0]], ran[m]) for m in ran if m not in rivals}
        ahead = [f"`{m}` ({-100 * found[0]:+.1f})" for m, found in behind.items() if found and found[0] < 0]
        text = f"With {weights} weights {', '.join(f'`{m}`' for m in rivals)} count here"
        if behind:
            text += f"; of {len(behind)} that ran less often {', '.join(ahead) or 'none'} "
            text += f"{'are' if len(ahead) > 1 else 'is'} ahead of `{rivals[0]}` in the runs of both"
        if missing := len(runs) - len(ran):
            text += f", and {missing} did not run"
        parts.append(text + ".")
    return " ".join(parts)


def summary_rows() -> list[list[str]]:
    """What is compared, and the difference over runs, over pairs and folds, and over folds.

    The default and features alone against the student alone and the nearest of the others that ran `often`, as published and
    chosen.
    """
    own = {method: runs for (method,), runs in scores_by(compared_lines(), "method").items()}
    published = {name: runs for name, runs in own.items() if not name.startswith(("drd", "none"))}
    chosen = {row["method"]: row["runs"] for row in tuned()[0] if not row["method"].startswith("drd") and row["runs"]}
    rows = []

    def add(what: str, ours: dict, theirs: dict, apart: bool = False) -> None:
        def fold_of(pair_and_fold: str) -> str:
            return pair_and_fold.rpartition(" ")[2]

        if apart:
            ours = {run: score for run, score in ours.items() if fold_of(run[0]) != "0"}
        found = paired_difference(ours, theirs), by_place(ours, theirs), by_place(ours, theirs, fold_of)
        rows.append([what, *map(_difference, found)])

    default, features = f"the default (`{OURS}`)", "`drd_aligned`, of features alone"
    for ours, name, of_features in ((OURS, default, False), ("drd_aligned", features, True)):
        add(f"{name}, over the student alone", own[ours], own["none"])
        for others, weights in ((published, "published weights"), (chosen, "chosen weights")):
            rivals = [m for m in often(others) if m in OF_FEATURES or not of_features]
            leads = {rival: paired_difference(own[ours], others[rival])[0] for rival in rivals}
            nearest = min(leads, key=leads.get)
            kind = "losses of features" if of_features else "others"
            what = f"over `{nearest}`, the nearest of {len(rivals)} {kind}, {weights}"
            add(what, own[ours], others[nearest])
            if others is published and not of_features:
                rival = nearest
        if not of_features:
            add("over `drd_aligned`", own[ours], own["drd_aligned"])
    for theirs in ("none", rival, "drd_aligned"):
        shown = "the student alone" if theirs == "none" else f"`{theirs}`"
        add(f"without fold 0: the default over {shown}", own[OURS], own[theirs], apart=True)
    return rows


def compare_summary() -> str:
    return table(
        ["points of test mIoU", "run by run", "one value a pair and fold", "one value a fold"], summary_rows()
    )


def compare_short() -> str:
    """Of the summary what is said of the default, without its middle column."""
    rows = [[what, of_runs, of_folds] for what, of_runs, _, of_folds in summary_rows()[:3]]
    return table(["points of test mIoU", "run by run", "one value a fold"], rows)


def compare_combined() -> str:
    """Losses together and with other settings: mean scores, and differences run by run; those that lack runs of ours last."""
    study = read_study(ROOT / "benchmarks/study/dubai_combined.yaml")
    lines = [line for line in study_lines(study) if line["pair"]]
    options = {line["method"]: line["options"] for line in lines}
    scores = scores_by([{**line, "fold": f"{line['pair']} {line['fold']}"} for line in lines], "method")
    ours, alone = scores.get((OURS,), {}), scores.get(("none",), {})
    pairs, rows = sorted({line["pair"] for line in lines}), []
    for (method,), runs in scores.items():
        means = []
        for pair in pairs:
            of_pair = [100 * score for (fold, _), score in runs.items() if fold.startswith(f"{pair} ")]
            means.append(f"{statistics.mean(of_pair):.1f} ({len(of_pair)})" if of_pair else "")
        lead, gain = paired_difference(ours, runs), paired_difference(runs, alone)
        theirs = paired_difference({run: score for run, score in ours.items() if run in runs}, alone)
        name = f"`{options[method]}`" if options[method] else "student alone"
        shown = [
            "" if method == "none" else _difference(gain),
            "" if method == OURS else _difference(lead),
            "" if method in (OURS, "none") else _difference(theirs),
        ]
        whole = runs.keys() >= ours.keys()
        rows.append((not whole, lead[0] if lead else math.inf, [name, *means, *shown]))
    head = ["", *(f"test mIoU (runs), {_arrow(pair)}" for pair in pairs), "gain over the student alone"]
    head += [f"lead of `{OURS}`", "its gain in these runs"]
    return table(head, [cells for *_, cells in sorted(rows, key=lambda row: row[:2])])


def compare_schedules() -> str:
    """Where a pair ran for several numbers of steps: the student alone, ours and `dist`, in the runs that all schedules have."""
    rows = []
    for name in ("dubai_published", "dubai_combined"):
        study = read_study(ROOT / f"benchmarks/study/{name}.yaml")
        lines = [
            line
            for line in study_lines(study, any_steps=True)
            if line["stage"] == "compare" and not line.get("tuned_on")
        ]
        scores = scores_by(lines, "pair", "steps", "method")
        for pair in sorted({pair for pair, *_ in scores}):
            schedules = sorted({steps for of_pair, steps, _ in scores if of_pair == pair})
            runs = [
                [scores.get((pair, steps, method), {}) for method in ("none", OURS, "dist")] for steps in schedules
            ]
            shared = set.intersection(*(alone.keys() & ours.keys() for alone, ours, _ in runs))
            if len(schedules) < 2 or not shared:
                continue
            for steps, (alone, ours, dist) in zip(schedules, runs, strict=True):
                alone, ours = ({run: of_method[run] for run in shared} for of_method in (alone, ours))
                means = [f"{100 * statistics.mean(of_method.values()):.1f}" for of_method in (alone, ours)]
                differences = _difference(paired_difference(ours, alone)), _difference(paired_difference(ours, dist))
                rows.append([f"{_arrow(pair)}, `{name}`", str(steps), *means, *differences])
    return table(["pair and study", "steps", "student alone", f"`{OURS}`", "gain", "lead over `dist`"], rows)


def _difference(found: tuple | None) -> str:
    """As in compare.md, without the interval of two runs, which says nothing."""
    return f"{100 * found[0]:+.1f} (n 2)" if found and found[3] == 2 else difference_text(found)


def _arrow(pair: str) -> str:
    return pair.replace("_to_", " → ")


TABLES = {
    "compare": compare,
    "compare-ablations": compare_ablations,
    "compare-combined": compare_combined,
    "compare-schedules": compare_schedules,
    "compare-rivals": compare_rivals,
    "compare-scores": compare_scores,
    "compare-short": compare_short,
    "compare-summary": compare_summary,
    "compare-tuned": compare_tuned,
    "compare-tuned-findings": compare_tuned_findings,
    "demo": demo,
    "demo-seeds": demo_seeds,
    "dubai": dubai,
    "dubai-findings": dubai_findings,
    "dubai-choice": dubai_choice,
    "relations": relations,
    "relations-aligned": relations_aligned,
    "relations-findings": relations_findings,
    "step": step,
    "step-findings": step_findings,
    "data": data,
    "metrics": metrics,
    "inference": inference,
    "layout": layout,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render(text: str, name: str = "the page") -> str:
    """The text of a page with everything between its markers made anew.

    Raises:
        ValueError: a marker without its partner, or a name that is not in `TABLES`.
    """
    markers = MARKER.findall(text)
    if any(("table:" in marker) != (i % 2 == 0) for i, marker in enumerate(markers)) or len(markers) % 2:
        raise ValueError(f"{name}: every <!-- table: NAME --> needs its own <!-- end -->")

    def filled(match: re.Match) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f"{name}: no table {match['name']!r}, there are {', '.join(TABLES)}")
        return f"<!-- table: {match['name']} -->\n{TABLES[match['name']]()}\n<!-- end -->"

    return MARKED.sub(filled, text)


def comparison(results: Path) -> str:
    """What compare.md of these lines is."""
    return markdown(lines_in(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that are out of date")
    args = parser.parse_args()
    stale = []
    for page in pages():
        name = page.relative_to(ROOT)
        try:
            new = render(old := page.read_text(encoding="utf-8"), str(name))
        except ValueError as error:
            sys.exit(f"error: {error}")
        if new != old:
            stale.append(str(name))
            if not args.check:
                page.with_suffix(".tmp").write_text(new, encoding="utf-8")
                os.replace(page.with_suffix(".tmp"), page)
    results = ROOT / "benchmarks/results"
    if comparison(results) != (results / "compare.md").read_text(encoding="utf-8"):
        stale.append("benchmarks/results/compare.md")
        if not args.check:
            with contextlib.redirect_stdout(io.StringIO()):
                collect(results)
    print(f"{'out of date' if args.check else 'written'}: {', '.join(stale) or 'nothing, all pages are up to date'}")
    if stale and args.check:
        sys.exit("error: run make tables")


if __name__ == "__main__":
    main()
