"""What a study file asks for, and the commands that are its runs. Nothing is read from or written to the results here."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from drd_hf.errors import UserError, nearest

ALONE = "none"  # the method that is the student without a teacher
SCRIPTS = {"alone": "scripts/train_teacher.py", "distilled": "scripts/distill.py", "score": "scripts/evaluate.py"}


@dataclass(frozen=True)
class Fold:
    """One division of a dataset: its prepared folder, and the splits of the layout file if they are not the file's own.

    `compared` is False for one that serves to choose weights alone: no student is scored on its test split.
    """

    folder: str
    splits: dict[str, list[str]] | None = None
    prepare: str | None = None
    compared: bool = True


@dataclass(frozen=True)
class Teacher:
    """How a teacher comes about: options of train_teacher.py, or `checkpoint`, a Hub id or folder that is used as it is.

    `trained[fold]` is the folder of an earlier run on that fold, used where it is there.
    """

    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    trained: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, with what its students' trainings change in those of the study."""

    teacher: str
    student: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None


@dataclass(frozen=True)
class Method:
    """A way to train the student: options of distill.py, `{weight}` in them standing for the weight that is tuned.

    `weights` are the candidates, `weight` is fixed and not tuned, `like` names the method whose options (unless given
    here) and tuned weight are taken. `labelled` is the share of training images that keep their labels. `teacher` takes
    the place of the pair's. `published` is the weight that distill.py takes where none is named: with it `={weight}` is
    left out, so that such a run is that of a method without weights.
    """

    name: str
    options: str = ""
    weights: tuple[float, ...] = ()
    weight: float | None = None
    like: str | None = None
    labelled: float = 1.0
    teacher: str | None = None
    published: float | None = None

    @property
    def alone(self) -> bool:
        return ALONE in (self.name, self.like)

    def options_with(self, weight: float | None) -> str:
        """The options of distill.py for a weight."""
        if weight is None:
            return self.options.replace("{weight}", "")
        if weight == self.published:
            return self.options.replace("={weight}", "")
        return self.options.replace("{weight}", f"{weight:g}")


@dataclass(frozen=True)
class Study:
    name: str
    dataset: str
    folds: tuple[Fold, ...]
    layout: str | None
    prepare: str | None
    steps: int
    all_steps: int | None  # of every pair, whatever the file says
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    teachers: dict[str, Teacher]
    pairs: dict[str, Pair]
    methods: dict[str, Method]
    ablations: dict[str, Method]
    tuning: dict[str, Any]  # fold, seeds, steps (None: as in the comparison)
    tuned_on: str | None  # the pair whose weights all pairs take; None: every pair is tuned by itself
    ablation_of: dict[str, list]
    runs: str

    @property
    def compared_folds(self) -> list[int]:
        return [index for index, fold in enumerate(self.folds) if fold.compared]

    def steps_of(self, pair: str) -> int:
        return self.all_steps or self.pairs[pair].steps or self.steps


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. `words` is its command from the project's root; two cells with the same words are the same run.

    `folder` is what it writes, `model` where the trained model is, the same unless it was trained before.
    """

    words: tuple[str, ...]
    folder: str
    model: str
    teacher: "Cell | None"
    data: "Data"
    facts: dict[str, Any]

    def __eq__(self, other) -> bool:
        return isinstance(other, Cell) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    @property
    def command(self) -> str:
        return shlex.join(("python", *self.words))

    @property
    def title(self) -> str:
        facts = self.facts
        weight = "" if facts.get("weight") is None else f" weight {facts['weight']:g}"
        return f"{facts['pair'] or facts['teacher']}: {facts['method']}{weight}, fold {facts['fold']}, seed {facts['seed']}"


@dataclass(frozen=True)
class Data:
    """A prepared folder: of a fold, or one made from it with labels for a share of its training images.

    Args:
        only_labelled: the images without labels are left out instead of being kept as unlabelled tiles.
    """

    fold: Fold
    labelled: float = 1.0
    only_labelled: bool = False

    @property
    def folder(self) -> str:
        if self.labelled == 1:
            return self.fold.folder
        return f"{self.fold.folder}_labelled{self.labelled * 100:g}{'_only' * self.only_labelled}"


_OPTIONAL = ("seeds", "settings", "teachers", "tuning", "tuned_on", "ablations", "runs")


def read_study(path: str | Path, steps: int | None = None) -> Study:
    """Read a study file. With the key `base` it takes what it does not say from another one in the same folder.

    Its name is that of the file, or the key `name`: files of one name share their runs.

    Args:
        steps: instead of the file's, for every student.

    Raises:
        UserError: unreadable, or a key is missing, unknown or wrong; the message names it.
    """
    path = Path(path)
    content = _read_yaml(path)
    if isinstance(content, dict) and "base" in content:  # all of another study file but for the keys that are here
        base = _read_yaml(path.parent / content.pop("base"))
        content = {**base, "name": path.stem, **content} if isinstance(base, dict) else base
    required = ("dataset", "steps", "pairs", "methods")
    _check_keys(content, path, required, ("name", *_OPTIONAL))
    dataset = content["dataset"]
    if isinstance(dataset, str):
        dataset = {"name": Path(dataset).name, "folds": [dataset]}
    _check_keys(dataset, f"{path}: dataset", ("name", "folds"), ("prepare", "layout"))
    if isinstance(content["methods"], str):
        content["methods"] = _read_yaml(path.parent / content["methods"])
    ablations = content.get("ablations") or {}
    _check_keys(ablations, f"{path}: ablations", (), ("pairs", "folds", "seeds", "methods"))
    methods = _methods(content["methods"], f"{path}: methods", {})
    tuning = {"fold": 0, "seeds": [0], "steps": None, **(content.get("tuning") or {})}
    _check_keys(tuning, f"{path}: tuning", (), ("fold", "seeds", "steps"))
    _check_seeds(tuning["seeds"], f"{path}: tuning")
    _check_seeds(content.get("seeds", [0]), path)
    _check_seeds(ablations.get("seeds", [0]), f"{path}: ablations")
    _check_folds(tuning["fold"], dataset["folds"], f"{path}: tuning: fold")
    _check_steps(content["steps"], path)
    if tuning["steps"] is not None:
        _check_steps(tuning["steps"], f"{path}: tuning")
    if steps is not None:
        tuning["steps"] = steps
    study = Study(
        name=content.get("name", path.stem),
        dataset=dataset["name"],
        folds=tuple(_record(Fold, {"folder": f} if isinstance(f, str) else f, path) for f in dataset["folds"]),
        layout=dataset.get("layout"),
        prepare=dataset.get("prepare"),
        steps=content["steps"],
        all_steps=steps,
        seeds=tuple(content.get("seeds", (0, 1, 2))),
        settings=content.get("settings") or {},
        teachers={name: _record(Teacher, t or {}, path) for name, t in (content.get("teachers") or {}).items()},
        pairs={name: _record(Pair, pair, path) for name, pair in content["pairs"].items()},
        methods=methods,
        ablations=_methods(ablations.get("methods") or {}, f"{path}: ablations", methods),
        tuning=tuning,
        tuned_on=content.get("tuned_on"),
        ablation_of={key: ablations[key] for key in ("pairs", "folds", "seeds") if key in ablations},
        runs=content.get("runs", "runs/compare"),
    )
    for name, pair in study.pairs.items():
        choose(study.teachers, [pair.teacher], f"{path}: teacher of {name}")
        if not isinstance(pair.student, dict) or "model" not in pair.student:
            raise UserError(
                f"{path}: student of {name} is {pair.student!r}; give options of distill.py, one being `model`"
            )
        if pair.steps is not None:
            _check_steps(pair.steps, f"{path}: {name}")
    if study.tuned_on is not None:
        choose(study.pairs, [study.tuned_on], f"{path}: tuned_on")
    for method in study.ablations.values():
        if method.teacher is not None:
            choose(study.teachers, [method.teacher], f"{path}: teacher of {method.name}")
    return study


def _read_yaml(path: Path):
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a study file (.yaml)") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def choose(known: Sequence | dict, wanted: Sequence | None, what: str) -> list:
    """`wanted`, all of which must be known; None: all that are known."""
    for name in wanted or ():
        if name not in known:
            raise UserError(f"{what}: {name!r} is not in the study; it has {nearest(str(name), map(str, known), 20)}")
    return list(known if wanted is None else wanted)


def _check_keys(content, what, required: Sequence[str], optional: Sequence[str]) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{what}: must be a mapping with the keys {', '.join((*required, *optional))}")
    for key in required:
        if key not in content:
            raise UserError(f"{what}: {key} is missing")
    for key in content:
        if key not in (*required, *optional):
            raise UserError(f"{what}: unknown key {key!r}; nearest: {nearest(str(key), (*required, *optional))}")


def _check_seeds(seeds, what) -> None:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{what}: seeds is {seeds!r}; give a list of whole numbers such as [0, 1]")


def _check_folds(fold, folds, what) -> None:
    if not isinstance(folds, list) or not folds:
        raise UserError(f"{what}: the dataset's folds are {folds!r}; give a list")
    if type(fold) is not int or not 0 <= fold < len(folds):
        raise UserError(f"{what} is {fold!r}; the dataset has folds 0 to {len(folds) - 1}")


def _check_steps(steps, what) -> None:
    if type(steps) is not int or steps < 1:
        raise UserError(f"{what}: steps is {steps!r}; give a whole number above 0")


def _number(value, what) -> None:
    if type(value) not in (int, float):
        hint = "; YAML reads numbers such as 1e-3 only with a point, 1.0e-3" if isinstance(value, str) else ""
        raise UserError(f"{what} is {value!r}, which is not a number{hint}")


def _record(record: type, content, what):
    if not isinstance(content, dict):
        raise UserError(f"{what}: {content!r}: must be a mapping with the keys of a {record.__name__.lower()}")
    try:
        return record(**content)
    except TypeError as error:
        reason = str(error).replace("__init__() ", "")
        raise UserError(f"{what}: {content}: {reason}") from None


def _methods(content: dict, what: str, known: dict[str, Method]) -> dict[str, Method]:
    if not isinstance(content, dict):
        raise UserError(f"{what}: must be a mapping of names to the keys of a method")
    methods = {}
    for name, values in content.items():
        if not isinstance(values, dict | None):
            raise UserError(f"{what}: {name} is {values!r}; give its keys, such as {{options: --method {name}}}")
        method = _record(Method, {"name": name, **(values or {})}, what)
        if not isinstance(method.weights, list | tuple):
            raise UserError(f"{what}: weights of {name} is {method.weights!r}; give a list")
        for weight in (*method.weights, *(w for w in (method.weight, method.published) if w is not None)):
            _number(weight, f"{what}: a weight of {name}")
        method = replace(method, weights=tuple(method.weights))
        if method.like is not None:
            models = {**known, **methods}
            choose(models, [method.like], f"{what}: like of {name}")
            method = replace(method, options=method.options or models[method.like].options)
        if method.alone and method.options:
            raise UserError(f"{what}: {name} trains without a teacher and takes no options")
        if not method.alone and not method.options:
            raise UserError(f"{what}: {name} has no options; give those of distill.py, such as '--method {name}'")
        if "{weight}" in method.options and not (method.weights or method.weight is not None or method.like):
            raise UserError(f"{what}: {name} has {{weight}} in its options; give weights to choose from, or weight")
        if method.published is not None and "={weight}" not in method.options:
            raise UserError(f"{what}: {name} has a published weight but no '={{weight}}' in its options to leave out")
        if method.published is not None:
            _check_published(method, what)
        if not 0 < method.labelled <= 1:
            raise UserError(f"{what}: {name}: labelled is {method.labelled}, give a share above 0 and at most 1")
        methods[name] = method
    return methods


def _check_published(method: Method, what: str) -> None:
    """A run that names no weight has that of distill.py: only that one may stand for it."""
    from drd_hf.losses.methods import METHODS

    for name in re.findall(r"([\w.]+)=\{weight\}", method.options):
        if name in METHODS and METHODS[name].weight != method.published:
            raise UserError(
                f"{what}: published of {method.name} is {method.published:g}, but without a weight {name} has "
                f"{METHODS[name].weight:g}; give that one"
            )


def teacher_cell(study: Study, name: str, fold: int, labelled: float, root: Path) -> Cell | None:
    """The run that makes a teacher, or that scores one which is there; None for one that is taken as it is."""
    teacher = study.teachers[name]
    if teacher.checkpoint is not None:
        return None
    data = Data(study.folds[fold], labelled, only_labelled=True)
    facts = {
        **_facts(study, name, labelled, fold),
        **{"pair": None, "method": "teacher", "options": "", "weight": None, "alone": True},
        **{
            "seed": teacher.options.get("seed", 0),
            "settings": teacher.options,
            "steps": teacher.options.get("max_steps"),
            "stage": "teacher",
        },
    }
    trained = teacher.trained.get(fold) if labelled == 1 else None
    if trained is not None and (root / trained / "run.json").is_file():
        options = {"model": trained, "dataset": data.folder, "split": "test", "windows": "tiles"}
        words = _words(SCRIPTS["score"], options)
        folder = f"{study.runs}/{study.name}/teachers/{name}_fold{fold}_{_digest(words)}"
        words = (*words, "--overwrite", "true", "--output", f"{folder}/test.json")
        return Cell(words, folder, trained, None, data, facts)
    options = {**teacher.options, "dataset": data.folder, "seed": teacher.options.get("seed", 0)}
    words = (*_words(SCRIPTS["alone"], options), *_COMMON, "--evaluate_on", "validation", "test")
    share = "" if labelled == 1 else f"_labelled{labelled * 100:g}"
    folder = f"{study.runs}/{study.name}/teachers/{name}{share}_fold{fold}_{_digest(words)}"
    return Cell((*words, "--output_dir", folder), folder, folder, None, data, facts)


def student_cell(
    study: Study,
    pair_name: str,
    method: Method,
    weight: float | None,
    fold: int,
    seed: int,
    root: Path,
    stage: str = "compare",
) -> Cell:
    """A student's run. While tuning, the test split is not scored."""
    pair = study.pairs[pair_name]
    teacher_name = method.teacher or pair.teacher
    data = Data(study.folds[fold], method.labelled, only_labelled=method.alone)
    settings = {**study.settings, **pair.settings}
    steps = (study.tuning["steps"] if stage == "tune" else None) or study.steps_of(pair_name)
    student = dict(pair.student)
    model = student.pop("model")
    teacher, options = None, method.options_with(weight)
    if method.alone:
        start = {"model": model, **student}
    else:
        teacher = teacher_cell(study, teacher_name, fold, method.labelled, root)
        where = study.teachers[teacher_name].checkpoint if teacher is None else teacher.model
        start = {"teacher": where, "score_teacher": False, "student": model, **student}
    words = (
        *_words(
            SCRIPTS["alone" if method.alone else "distilled"],
            {**start, "dataset": data.folder, **settings, "max_steps": steps, "seed": seed},
        ),
        *shlex.split(options),
        *_COMMON,
        *("--evaluate_on", "validation", *["test"] * (stage != "tune")),
    )
    kind = "tuning" if stage == "tune" else "students"
    name = f"{method.name}_fold{fold}_seed{seed}_steps{steps}_{_digest(words)}"
    folder = f"{study.runs}/{study.name}/{kind}/{pair_name}/{name}"
    where = tuned_on(study, pair_name, method)
    if stage != "tune" and method.published is not None and weight == method.published:
        weight = where = None  # the run of those who name no weight
    facts = {
        **_facts(study, teacher_name, method.labelled, fold),
        **{"pair": pair_name, "method": method.name, "options": options, "weight": weight, "alone": method.alone},
        **{"tuned_on": None if stage == "tune" else where, "student": pair.student},
        **{"seed": seed, "settings": settings, "steps": steps, "stage": stage},
        "study_steps": study.all_steps or study.steps,
    }
    return Cell((*words, "--output_dir", folder), folder, folder, teacher, data, facts)


_COMMON = ("--save_strategy", "no", "--disable_tqdm", "true", "--overwrite", "true")


def tuned_on(study: Study, pair: str, method: Method) -> str | None:
    """The pair on which the weight of `method` is chosen for `pair`; None where there is nothing to choose."""
    if method.weight is not None or "{weight}" not in method.options:
        return None
    return study.tuned_on or pair


def candidates(study: Study, pair: str, method: Method, root: Path) -> list[Cell]:
    """The runs, one for each weight and seed, by which the weight of `method` is chosen for `pair`.

    None where it has no candidates itself. Where others have, the student alone has one for each seed, to see them against.
    """
    weights, where = method.weights, tuned_on(study, pair, method)
    if method.name == ALONE:
        weights = (None,)
        where = next(filter(None, (tuned_on(study, pair, other) for other in study.methods.values())), None)
    if where is None or method.like is not None:
        return []
    return [
        student_cell(study, where, method, weight, study.tuning["fold"], seed, root, "tune")
        for seed in study.tuning["seeds"]
        for weight in weights
    ]


def best_weight(by_weight: dict[float, list[float | None]]) -> tuple[float | None, dict[float, float | None]]:
    """The weight with the highest mean score, None where there is none, and the means: None where a seed diverged (None)."""
    means = {w: None if None in of_seeds else sum(of_seeds) / len(of_seeds) for w, of_seeds in by_weight.items()}
    finite = {weight: mean for weight, mean in means.items() if mean is not None}
    return max(finite, key=finite.get, default=None), means


def _facts(study: Study, teacher: str, labelled: float, fold: int) -> dict:
    return {
        "study": study.name,
        "dataset": study.dataset,
        "teacher": teacher,
        "labelled": labelled,
        "fold": fold,
    }


def _words(script: str, options: dict[str, Any]) -> tuple[str, ...]:
    words = [script]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return tuple(words)


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]
