"""Tables and plots of a comparison, from its lines alone."""

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from scipy import stats

from benchmarks.study.lines import read_lines
from drd_hf.plots import bars_picture

CONFIDENCE = 0.95
OURS = "drd_channels_classes"  # the method that the others are set against, the default of distill.py
PAPER, INK, GRID, WORSE, BETTER = "white", (30, 30, 30), (225, 225, 225), (178, 24, 43), (8, 69, 148)


def paired_difference(ours: dict, theirs: dict) -> tuple[float, float, float, int] | None:
    """Mean of `ours[key] - theirs[key]` over the keys of both, its confidence interval, and their number.

    The interval is that of Student's t with n - 1 degrees of freedom, NaN for one key; None without any.
    """
    differences = [ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return mean, math.nan, math.nan, 1
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half, n


def by_place(ours: dict, theirs: dict, place=lambda fold: fold) -> tuple[float, float, float, int] | None:
    """`paired_difference` of {(fold, seed): score} with one difference for each place.

    It is the mean over the place's folds of the means over their seeds. Runs of one place share its test images: their number says
    nothing about other places.

    Args:
        place: {fold: its place} as a function; each fold is one of its own unless told otherwise.
    """
    places = {}
    for fold in sorted({fold for fold, _ in ours.keys() & theirs.keys()}):
        mean, *_ = paired_difference({run: score for run, score in ours.items() if run[0] == fold}, theirs)
        places.setdefault(place(fold), []).append(mean)
    means = {name: statistics.mean(of_folds) for name, of_folds in places.items()}
    return paired_difference(means, dict.fromkeys(means, 0.0))


def sections(lines: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """(title, lines) of the same students, trained in the same way; of a repeated run only the last line."""
    last = {line["command"]: line for line in lines if line.get("pair")}
    found = {}
    for line in last.values():
        key = json.dumps([line[k] for k in ("study", "dataset", "pair", "student", "steps", "settings")])
        found.setdefault(key, []).append(line)
    return [(f"{g[0]['dataset']}: {g[0]['pair']}, {g[0]['steps']} steps", g) for g in found.values()]


def pooled(lines: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """(title, lines) of all pairs of a study together, each with its number of steps, a pair's fold being one of its own.

    Ablations, which ran for some pairs, are left out, and so are options that differ between pairs: of each method there is
    one row with its own weight and one with weights that were chosen, its options "tuned", each with the options that ran
    last for a pair, or, where one pair chose for all, last for any.
    """
    last = {line["command"]: line for line in lines if line.get("pair") and line.get("stage") != "ablate"}
    found, options = {}, {}
    for line in sorted(last.values(), key=lambda line: line["finished"]):
        steps = line.get("study_steps", line["steps"])
        group = found.setdefault((line["study"], line["dataset"], steps), [])
        kind = "tuned" if line.get("tuned_on") else ""
        options[line["study"], steps, line.get("tuned_on") or line["pair"], line["method"], kind] = line["options"]
        group.append((kind, line))
    tables = []
    for (study, dataset, steps), group in found.items():
        group = [
            {**line, "fold": f"{line['pair']} {line['steps']} {line['fold']}", "teacher": "all", "options": kind}
            | {"study_steps": steps}
            for kind, line in group
            if kind == "" or options[study, steps, line["tuned_on"], line["method"], kind] == line["options"]
        ]
        if len({line["pair"] for line in group}) > 1:
            shown = " or ".join(map(str, sorted({line["steps"] for line in group})))
            tables.append((f"{dataset}: all pairs, {shown} steps", group))
    return tables


def rows_of(lines: Sequence[dict]) -> list[dict]:
    """One row for each method with its options and its share of labels, the best mean first.

    A row has one line for each fold and seed, the last one. Where ours is there with several options, the others are compared
    with its own weights, or, where these did not run, with those that were chosen last.
    """
    groups = {}
    for line in lines:
        teacher = None if line["alone"] else line["teacher"]
        group = groups.setdefault((line["method"], line["options"], line["labelled"], teacher), {})
        group[line["fold"], line["seed"]] = line
    groups = {key: list(group.values()) for key, group in groups.items()}
    by_age = sorted(groups.items(), key=lambda item: max(line["finished"] for line in item[1]))
    alone = {key[2]: _scores(group) for key, group in by_age if group[0]["alone"]}
    own_last = sorted(by_age, key=lambda item: not item[1][0].get("tuned_on"))
    ours = {key[2]: _scores(group) for key, group in own_last if key[0] == OURS}
    rows = []
    for (method, options, labelled, teacher), group in groups.items():
        scores = _scores(group)
        values = list(scores.values())
        rows.append(
            {
                "method": method,
                "options": options,
                "labelled": labelled,
                "teacher": teacher,
                "tuned": bool(group[0].get("tuned_on")),
                "ablation": group[0].get("stage") == "ablate",
                "runs": len(values),
                "diverged": sum(bool(line["error"]) for line in group),
                "validation": _mean(line.get("validation_mean_iou") for line in group),
                "test": _mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "gain": None if group[0]["alone"] else paired_difference(scores, alone.get(labelled, {})),
                "behind": None if method == OURS else paired_difference(ours.get(labelled, {}), scores),
                "seconds": _mean(line["seconds"] for line in group),
                "milliseconds": _mean(line["milliseconds_per_step"] for line in group),
                "megabytes": _mean(line["peak_gpu_megabytes"] or line["peak_megabytes"] for line in group),
            }
        )
    return sorted(rows, key=lambda row: -math.inf if row["test"] is None else row["test"], reverse=True)


def markdown(lines: Sequence[dict]) -> str:
    """All tables. Scores are mean IoU on the test split in percent, differences are in points."""
    parts = [
        "# Comparison of distillation methods",
        "Written by `python benchmarks/compare.py STUDY.yaml --stage collect` from compare.jsonl. Test mIoU in percent, "
        f"mean ± standard deviation over seeds and folds. Gain over the student alone and lead of `{OURS}` (with its own weights, where it ran with them) over a method are "
        "mean differences of the n pairs of runs with the same fold and seed that are finished, with their 95 % t interval; runs of one fold share their "
        "test images, so that intervals tell more about seeds than about other places. Weights were chosen on validation where a pair is named for it; runs with one that was chosen before others were tried are left out. "
        "Seconds are those of the training; other work on the machine lengthens them. Memory is the peak of the process with "
        "the scoring at its end, of the GPU where there is one.",
    ]
    teachers = {}
    for line in lines:
        if line.get("method") == "teacher" and line.get("test_mean_iou") is not None:
            teachers[line["study"], line["teacher"], line["labelled"], line["fold"]] = line["test_mean_iou"]
    for title, group in sections(lines):
        one = group[0]
        of_teacher = [
            f"{name}{'' if share == 1 else f' ({share:.0%} of labels)'} fold {fold} {100 * score:.1f}"
            for (study, name, share, fold), score in sorted(teachers.items(), key=str)
            if study == one["study"] and name in {line["teacher"] for line in group}
        ]
        devices = sorted({f"{line['device']} ({line['processor']})" for line in group})
        folds, seeds = (sorted({line[key] for line in group}) for key in ("fold", "seed"))
        settings = ", ".join(f"{name} {value}" for name, value in one["settings"].items())
        tuned = sorted({line["tuned_on"] for line in group if line["tuned_on"]})
        code = ", ".join(f"{digest} ({n} runs)" for digest, n in Counter(line["code"] for line in group).items())
        parts += [
            f"## {title}",
            f"Teachers: {', '.join(of_teacher) or 'not scored'}. Folds {_listed(folds)}, seeds {_listed(seeds)}. "
            f"Weights chosen on {', '.join(tuned) or 'no pair'}. Device: {'; '.join(devices)}. Code {code}. Settings: {settings}.",
            _table(rows_of(group)),
        ]
    for title, group in pooled(lines):
        parts += [f"## {title}", "Each run counts once, whatever its pair.", _table(rows_of(group))]
    return "\n\n".join(parts) + "\n"


def lines_in(results: Path) -> list[dict]:
    """The lines of compare.jsonl without those whose weight was chosen once and is not what compare_tuning.jsonl says now."""
    chosen = {
        (line["study"], line["pair"], line["method"]): line["chosen_weight"]
        for line in read_lines(results / "compare_tuning.jsonl")
        if "chosen_weight" in line
    }
    lines = read_lines(results / "compare.jsonl")
    return [
        line
        for line in lines
        if not line.get("tuned_on")
        or chosen.get((line["study"], line["tuned_on"], line["method"]), line["weight"]) == line["weight"]
    ]


def collect(results: Path) -> None:
    """Write compare.md and a plot of each of its tables from the lines in the folder, and print the tables."""
    lines = lines_in(results)
    text = markdown(lines)
    results.mkdir(parents=True, exist_ok=True)
    (results / "compare.md.tmp").write_text(text, encoding="utf-8")
    os.replace(results / "compare.md.tmp", results / "compare.md")
    print(text)
    for title, group in pooled(lines):
        rows, one = rows_of(group), group[0]
        if any(row["gain"] for row in rows):
            gains_picture(rows, title, results / f"compare_{one['study']}_all_pairs_{one['study_steps']}_gains.png")
    names = []
    for title, group in sections(lines):
        rows = rows_of(group)
        name = "compare_" + "_".join(str(group[0][key]) for key in ("study", "pair", "steps"))
        names.append(name)
        name += f"_{names.count(name)}" * (names.count(name) > 1)  # the same but for other settings
        if any(row["gain"] and not row["ablation"] for row in rows):
            gains_picture(rows, title, results / f"{name}_gains.png")
        classes_picture(group, rows, title, results / f"{name}_classes.png")
    print(f"written to {results / 'compare.md'}")


def gains_picture(rows: Sequence[dict], title: str, path: Path) -> None:
    """Gain of each method over the student alone, in points of mIoU, with its interval; those of two runs may end at the edge."""
    rows = [row for row in rows if row["gain"] and not row["ablation"]]
    rows.sort(key=lambda row: row["gain"][0], reverse=True)
    ends = [0.0]  # the interval of two runs is often several times as wide as all others together
    for mean, *interval, n in (row["gain"] for row in rows):
        ends += [100 * x for x in ([mean, *interval] if n > 2 else [mean])]
    low, high = min(ends), max(ends)
    font, line, gap = ImageFont.load_default(15), 24, 12
    left = gap * 2 + math.ceil(max(font.getlength(_name(row)) for row in rows))
    width, top = 480, gap * 2 + 2 * line
    picture = Image.new("RGB", (left + width + 120, top + line * (len(rows) + 1) + gap), PAPER)
    draw = ImageDraw.Draw(picture)
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 10)

    def x(value: float) -> float:
        return left + (value - low) / max(high - low, 1e-6) * width

    draw.text((gap, gap), title, fill=INK, font=font)
    draw.text(
        (gap, gap + line), "gain over the student alone, points of test mIoU, 95 % interval", fill=INK, font=font
    )
    bottom = top + line * len(rows)
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        draw.line((x(tick * step), top, x(tick * step), bottom), fill=INK if tick == 0 else GRID)
        draw.text((x(tick * step), bottom + line / 2), f"{tick * step:g}", fill=INK, font=font, anchor="mm")
    for i, row in enumerate(rows):
        mean, lower, upper, n = row["gain"]
        y = top + line * (i + 0.5)
        color = BETTER if mean > 0 else WORSE
        draw.text((left - gap, y), _name(row), fill=INK, font=font, anchor="rm")
        if not math.isnan(lower):
            draw.line((max(left, x(100 * lower)), y, min(left + width, x(100 * upper)), y), fill=color, width=2)
        draw.ellipse((x(100 * mean) - 5, y - 5, x(100 * mean) + 5, y + 5), fill=color)
        draw.text((left + width + gap, y), f"{100 * mean:+.1f} (n {n})", fill=INK, font=font, anchor="lm")
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, "png")
    os.replace(temporary, path)


def classes_picture(lines: Sequence[dict], rows: Sequence[dict], title: str, path: Path) -> None:
    """IoU of each class: the student alone, ours, and the best of the other methods with all labels."""
    whole = [row for row in rows if row["labelled"] == 1 and row["test"] is not None and not row["ablation"]]
    alone = [row for row in whole if row["gain"] is None and row["teacher"] is None][:1]
    ours = sorted((row for row in whole if row["method"] == OURS), key=lambda row: row["tuned"])[:1]
    others = [row for row in whole if row not in alone and not row["method"].startswith("drd")][:1]
    shown = {}
    for row in (*alone, *ours, *others):
        group = [line for line in lines if all(line[key] == row[key] for key in ("method", "options", "labelled"))]
        names = list(dict.fromkeys(key for line in lines for key in line if key.startswith("test_iou_")))
        shown[_name(row)] = [_mean(line.get(key) for line in group) or math.nan for key in names]
    if shown:
        names = [key.removeprefix("test_iou_") for key in names]
        bars_picture(shown, names, [GRID] * len(names), f"{title}: IoU on test", path)


def _scores(lines: Sequence[dict]) -> dict[tuple, float]:
    return {
        (line["fold"], line["seed"]): line["test_mean_iou"] for line in lines if line.get("test_mean_iou") is not None
    }


def _mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else None


def _name(row: dict) -> str:
    share = "" if row["labelled"] == 1 else f" ({row['labelled']:.0%} of labels)"
    return f"{row['method']}{', tuned' * row['tuned']}{share}"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _table(rows: Sequence[dict]) -> str:
    head = ("method", "options", "runs", "val mIoU", "test mIoU", "gain over alone", "lead of ours", "s a run",
            "ms a step", "MB")  # fmt: skip
    body = [
        (
            _name(row),
            f"`{row['options']}`" if row["options"] else "",
            f"{row['runs']}" + f" ({row['diverged']} diverged)" * bool(row["diverged"]),
            _number(row["validation"], 100),
            _number(row["test"], 100) + ("" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"),
            difference_text(row["gain"]),
            difference_text(row["behind"]),
            _number(row["seconds"], digits=0),
            _number(row["milliseconds"], digits=0),
            _number(row["megabytes"], digits=0),
        )
        for row in rows
    ]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, scale: float = 1, digits: int = 1) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def difference_text(difference: tuple | None) -> str:
    """A `paired_difference` in points of mIoU, with its interval and number of pairs."""
    if difference is None:
        return ""
    mean, lower, upper, n = difference
    if math.isnan(lower):
        return f"{100 * mean:+.1f} (n 1)"
    return f"{100 * mean:+.1f} [{100 * lower:+.1f}, {100 * upper:+.1f}] (n {n})"
