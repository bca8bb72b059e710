import importlib
import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import markdown_it
import numpy as np
import pytest
import rasterio
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from drd_hf.cards import (
    Example,
    MeasuredResult,
    ModelCardFacts,
    Profile,
    facts_from_json,
    facts_to_json,
    hub_id,
    read_facts,
    render_model_card,
    write_model_card,
)
from drd_hf.errors import UserError

from .conftest import tiny_model

NAN = float("nan")
RESULT = MeasuredResult(
    dataset="ISPRS Potsdam",
    split="test",
    protocol="tiles of 256, each pixel once",
    metrics={
        "mean_iou": 0.75321,
        "mean_f1": 0.85,
        "mean_accuracy": 0.84,
        "overall_accuracy": 0.9,
        "kappa": 0.87,
        "iou_building": 0.8,
        "iou_low_vegetation": 0.70642,
        "f1_building": 0.89,
        "f1_low_vegetation": 0.81,
        "accuracy_building": 0.9,
        "accuracy_low_vegetation": NAN,
    },
    teacher_metrics={"mean_iou": 0.78, "overall_accuracy": 0.91},
    student_alone_metrics={"mean_iou": 0.73, "overall_accuracy": NAN},
)
WHOLE = MeasuredResult(
    dataset="ISPRS Potsdam",
    split="test",
    protocol="protocol isprs, eroded reference, whole images",
    metrics={"5_classes/mean_iou": 0.81, "6_classes/mean_iou": 0.76, "overall_accuracy": 0.93},
    teacher_metrics={"5_classes/mean_iou": 0.86, "6_classes/mean_iou": None, "overall_accuracy": 0.95},
)
PLAIN = ModelCardFacts(
    model_name="tiny", architecture="TinyModel", num_parameters=1234, id2label={0: "building", 1: "low_vegetation"}
)
DISTILLED = replace(
    PLAIN,
    model_name="someone/tiny-potsdam",
    colors=[(0, 0, 255), (0, 255, 255)],
    bands=["near_infrared", "red", "green"],
    image_mean=[0.5, 0.25, 0.125],
    image_std=[0.2, 0.2, 0.1],
    license="apache-2.0",
    base_model=["nvidia/mit-b0", "/home/someone/checkpoint-5"],
    tags=["isprs"],
    dataset_name="ISPRS Potsdam",
    dataset_id="someone/potsdam",
    dataset_description="38 true orthophotos.",
    tile_size=256,
    num_tiles={"train": 3456, "test": 2016},
    ground_sampling_distance=0.05,
    colors_in_config=True,
    dataset_license="no redistribution, see https://www.isprs.org/terms",
    dataset_citation="Rottensteiner et al. 2012",
    teacher="/data/runs/teacher-b2/",
    teacher_num_parameters=27_000_000,
    results=[RESULT, WHOLE],
    confusion="ISPRS Potsdam, test: whole images",
    comparison=True,
    curves=True,
    examples=[Example("examples/test_1.jpg", "top_2_13 (0, 256)"), Example("examples/test_2.jpg", "top_7_13 (0, 0)")],
    distillation={"relation": "cosine", "feature_layers": ["stages.2", "stages.3"], "weights": {"spatial": 1.0}},
    training={"learning_rate": 6e-05, "output_dir": "/home/someone/my runs/out"},
    seed=0,
    steps=100,
    hardware="2 CPU cores",
    versions={"drd_hf": "0.1.0", "torch": "2.15"},
    command="accelerate launch scripts/distill.py --config scripts/configs/a.yaml --output_dir='/home/someone/my runs/out'",
    profile=Profile(256, "1 CPU core", 12.34, 1_234_567_890, 123.45, 98_765_432_100),
)
EXPECTED = (Path(__file__).parent / "data" / "model_card.md").read_text(encoding="utf-8")


def headings(card):
    return re.findall(r"^## (.*)$", card, re.MULTILINE)


def test_the_whole_card():
    assert render_model_card(DISTILLED) == EXPECTED


def test_sections_without_facts_vanish():
    card = render_model_card(PLAIN)
    assert headings(card) == ["Classes", "How to use", "Limits"]
    assert "\n\n\n" not in card and card.endswith(".\n")
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "remote-sensing"],
    }


def test_a_model_trained_without_a_teacher_does_not_speak_of_distillation():
    card = render_model_card(
        replace(
            DISTILLED,
            distillation=None,
            teacher=None,
            results=[],
            model_name="plain",
            profile=Profile(256, "cpu", 1.0),
        )
    )
    assert not re.search("distill(ed|ation)|teacher|2506.20688", card.replace("scripts/distill.py", ""), re.IGNORECASE)
    assert "Citation" not in headings(card)


def test_losses_beside_the_method_are_said_in_the_first_sentence():
    weights = {"spatial_relation weight": 3.0, "channel_relation weight": 3.0}
    alone = render_model_card(replace(DISTILLED, distillation=weights))
    both = render_model_card(replace(DISTILLED, distillation=weights | {"skd weight": 5.0}))
    assert "with Dual Relation Distillation." in alone
    assert "with Dual Relation Distillation and other losses." in both


@pytest.mark.parametrize(
    ("terms", "related", "cites_dist"),
    [
        (("spatial_relation", "channel_relation"), "features", False),
        (
            ("channel_alignment", "spatial_class_alignment", "channel_class_alignment"),
            "features and class probabilities",
            True,
        ),
        (("spatial_class_alignment",), "class probabilities", False),
    ],
)
def test_the_card_says_of_what_the_relations_are(terms, related, cites_dist):
    card = render_model_card(replace(DISTILLED, distillation={f"{term} weight": 1.0 for term in terms}))
    assert f"relations of the student's {related}, between positions" in card
    assert ("DIST" in card) == cites_dist and "with Dual Relation Distillation." in card


def test_a_model_distilled_with_other_losses_does_not_claim_the_method():
    card = render_model_card(replace(DISTILLED, dual_relation=False))
    assert "How it was distilled" in headings(card) and "Citation" not in headings(card)
    assert not re.search("dual.relation", card, re.IGNORECASE)
    assert "knowledge-distillation" in ModelCard(card).data.tags


@pytest.mark.parametrize(
    ("facts", "gone"),
    [
        ({"results": [], "confusion": None}, ["Results"]),
        ({"profile": None}, ["Size and speed"]),
        ({"bands": (), "image_mean": (), "image_std": ()}, ["Input"]),
        ({"dataset_license": None, "dataset_citation": None}, ["Terms of the data"]),
        (
            {
                "training": {},
                "seed": None,
                "steps": None,
                "hardware": None,
                "versions": {},
                "command": None,
                "curves": False,
            },
            ["How it was trained"],
        ),
    ],
)
def test_only_the_section_whose_facts_are_missing_vanishes(facts, gone):
    card = render_model_card(replace(DISTILLED, **facts))
    assert headings(card) == [heading for heading in headings(EXPECTED) if heading not in gone]
    assert "\n\n\n" not in card


@pytest.mark.parametrize("facts", [{"dataset_license": None}, {"dataset_citation": None}, {"profile": None}])
@pytest.mark.parametrize("more", [{}, {"distillation": {}}, {"colors": None}, {"command": None}, {"training": {}}])
def test_blank_lines_stay_single_whichever_fact_is_missing(facts, more):
    card = render_model_card(replace(DISTILLED, **facts, **more))
    assert "\n\n\n" not in card and "\n\n" in card
    assert all(card[m.start() - 2 : m.start()] == "\n\n" for m in re.finditer("^## ", card, re.MULTILINE))


def test_a_teacher_on_the_hub_is_linked_and_its_place_among_the_base_models_explained():
    card = render_model_card(replace(DISTILLED, teacher_id="someone/teacher"))
    assert "distilled from [someone/teacher](https://huggingface.co/someone/teacher)" in card
    assert "no relation of its own for distillation" in card
    assert "no relation of its own" not in render_model_card(DISTILLED)
    same = replace(DISTILLED, teacher_id="someone/teacher", base_model=["someone/teacher"])
    assert "no weight of it" not in render_model_card(same)  # the student started from its teacher


NASTY = "# a|b\n---\n{{ 7 * 7 }} {% if %} \"q\" 'p' `c` <b>*_x_* [l](u) # é 🛰"


def test_nasty_text_comes_back_unchanged_from_the_metadata():
    result = MeasuredResult(NASTY, NASTY, NASTY, {"mean_iou": 0.5, f"iou_{NASTY}": 0.25, "kappa": NAN})
    facts = replace(
        DISTILLED, model_name=NASTY, license=NASTY, tags=[NASTY], id2label={"1": "no: [x", "0": NASTY},
        dataset_name=NASTY, dataset_id=None, base_model=[NASTY], teacher=NASTY, results=[result],
    )  # fmt: skip
    data = ModelCard(render_model_card(facts)).data
    assert data.model_name == NASTY and data.license == NASTY and data.tags[-1] == NASTY
    assert data.base_model is None
    same = {
        "task_type": "image-segmentation", "task_name": "Semantic segmentation",
        "dataset_type": NASTY, "dataset_name": NASTY, "dataset_split": NASTY,
    }  # fmt: skip
    assert data.eval_results == [
        EvalResult(**same, metric_type="mean_iou", metric_name=f"mIoU ({NASTY}, {NASTY})", metric_value=0.5),
        EvalResult(
            **same, metric_type=f"iou_{NASTY}", metric_name=f"IoU of {NASTY} ({NASTY}, {NASTY})", metric_value=0.25
        ),
    ]  # kappa is NaN and left out


def test_nasty_text_does_not_leave_its_place_in_the_text():
    result = MeasuredResult(NASTY, NASTY, NASTY, {"mean_iou": 0.5, f"iou_{NASTY}": 0.25, NASTY: 1.0})
    nasty = dict.fromkeys(
        ("model_name", "architecture", "dataset_name", "dataset_license", "dataset_citation", "teacher", "hardware"),
        NASTY,
    )
    settings = {NASTY: NASTY, "list": [NASTY]}
    facts = replace(
        DISTILLED, **nasty, id2label={0: NASTY, 1: "x"}, results=[result], distillation=settings, training=settings,
        versions=settings, profile=Profile(256, NASTY, 1.0),
    )  # fmt: skip
    text = ModelCard(render_model_card(facts)).text
    assert headings(text) == headings(EXPECTED)
    assert "49" not in text
    assert not re.search(r"^---$", text, re.MULTILINE)
    prose = re.sub(r"^(```+).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)  # without fenced code,
    prose = re.sub(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)  # without code spans
    assert "<b\\>" in prose and not re.search(r"(?<!\\)(<b|\*|\[l)", prose.replace("**", ""))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # every row of a table has as many cells as its head
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()]
        assert len(set(cells)) == 1, block


# Whatever looks like a piece of Markdown, HTML, YAML or jinja, between letters.
PIECES = [
    *"`~|\\<>[]()!*_#-+=\"':;&$%@{}/.,\n\r\t\v\f\x00\x1b\x85\u2028\u2029\ufeff aZ0é🛰",
    "\n---\n", "\n...\n", "```", "~~~", "\n## x\n", "<script>", "</code>", "<!--", "&#124;", "\\|", "$$", "\\(", "{{ 7 * 7 }}",
    "{% raw %}", "\n\n", "- ", "1. ", "!!python/object:x", "? ", "null", "~", "www.a.org", "[a]: b", "\n    ", "http://a.org/",
]  # fmt: skip
ANYTHING = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


def filled_with(texts):
    """Facts in which every text of a user is one of `texts`, six of them that differ."""
    one, two, three, four, five, six = texts
    scores = {"mean_iou": 0.5, f"iou_{one}": 0.25, five: 1.0, f"5_classes/{six}": 0.125}
    result = MeasuredResult(one, two, three, scores, {"mean_iou": 0.75}, {"mean_iou": None})
    return replace(
        DISTILLED, model_name=one, architecture=two, id2label={0: one, 1: two}, license=three, tags=[four],
        dataset_name=one, dataset_id=None, dataset_description=two, dataset_license=three, dataset_citation=four,
        teacher=five, bands=[one, two, three], results=[result], confusion=six, hardware=four, command=five,
        examples=[Example("examples/test_1.jpg", six)], distillation={one: two, "list": [three, {four: five}]},
        training={two: one, three: four}, versions={five: six}, num_tiles={two: 3},
        profile=Profile(256, six, 1.0, 2, 3.0, 4),
    )  # fmt: skip


def skeleton(text):
    """The structure of a Markdown text, without its words: blocks, and what is no plain text within a line."""
    plain = {"text", "code_inline", "softbreak", "text_special", "linkify"}
    found = []
    for token in markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        inline = [
            t.type for t in token.children or () if t.type not in plain and t.content not in ("<code>", "</code>")
        ]
        found.append((token.type, token.tag, token.markup[:3], token.info, tuple(inline)))
    return found


TAME = ModelCard(render_model_card(filled_with(["a b", "c d", "e f", "g h", "i j", "k l"])))
SKELETON = skeleton(TAME.text)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(ANYTHING.filter(lambda text: text.strip()), min_size=6, max_size=6, unique_by=lambda t: t.strip())
)
def test_no_text_of_a_user_changes_the_structure_of_the_card(texts):
    card = render_model_card(filled_with([*texts]))
    assert skeleton(ModelCard(card, ignore_metadata_errors=True).text) == SKELETON
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert metadata.keys() == TAME.data.to_dict().keys()
    assert metadata["license"] == texts[2] and metadata["tags"][-1] == texts[3]
    assert metadata["widget"] == [{"src": "examples/test_1.jpg", "example_title": texts[5]}]


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(ANYTHING.filter(lambda text: text.strip()), min_size=6, max_size=6, unique_by=lambda t: t.strip())
)
def test_facts_that_were_kept_give_the_same_card(texts):
    facts = filled_with([*texts])
    kept = json.loads(json.dumps(facts_to_json(facts), allow_nan=False))
    assert render_model_card(facts_from_json(kept)) == render_model_card(facts)


def test_a_command_with_a_fence_stays_in_its_fence():
    text = ModelCard(render_model_card(replace(DISTILLED, command="echo '\n```\n## out\n'"))).text
    assert "\n````bash\necho '\n```\n## out\n'\n````\n" in text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/jane/secret/run-1", "run-1"),
        ("/a/b/c/run-1/", "run-1"),
        ("/home/jane/my secret/run-1", "run-1"),
        ("~/secret/run-1", "run-1"),
        ("../secret/run-1", "run-1"),
        (r"C:\Users\jane\secret\run-1", "run-1"),
        ("file:///home/jane/secret/run-1", "run-1"),
        ("/.cache/jane/secret/run-1", "run-1"),
    ],
)
def test_paths_of_the_machine_are_cut_to_their_last_name(path, shown):
    facts = replace(
        DISTILLED, model_name=path, teacher=path, base_model=[path], dataset_name=path, hardware=f"at {path!r}",
        distillation={"teacher": path, "list": [path]}, training={"output_dir": path}, versions={"drd_hf": path},
        dataset_license=f"see '{path}'", command=f"python a.py --out '{path}' --again=\"{path}\"",
        results=[replace(RESULT, dataset=path, split=path, protocol=f"from '{path}'")], profile=Profile(1, f"'{path}'", 1),
    )  # fmt: skip
    card = render_model_card(facts)
    assert not re.search(r"jane|secret|/b/|Users|file:", card)
    assert f"python a.py --out '{shown}' --again=\"{shown}\"" in card
    assert f"# {shown}\n" in card and f"distilled from {shown} " in card


def test_paths_without_quotes_in_a_command_are_cut_and_links_and_relative_paths_stay():
    command = "python scripts/distill.py --out=/home/jane/x --data /mnt/jane/y; curl https://a.org/b/c"
    card = render_model_card(replace(PLAIN, command=command))
    assert "\npython scripts/distill.py --out=x --data y; curl https://a.org/b/c\n" in card


def test_a_relative_folder_is_no_hub_id(tmp_path, monkeypatch):
    # A folder "runs/teacher" looks like a Hub id: the card must not link to a stranger's model.
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/teacher") == "runs/teacher"
    os.makedirs("runs/teacher")
    assert hub_id("runs/teacher") is None
    assert hub_id("teacher") is None and hub_id(None) is None and hub_id("a/b/c") is None


def test_the_card_is_the_same_wherever_it_is_rendered(tmp_path, monkeypatch):
    # It changed with the folder it was rendered in: a Hub id was no link where a folder of that name was.
    facts = replace(DISTILLED, teacher_id="someone/teacher")
    here = render_model_card(facts)
    monkeypatch.chdir(tmp_path)
    for name in (*facts.base_model, facts.teacher_id, facts.dataset_id):
        if "//" not in name and not name.startswith("/"):
            os.makedirs(name)
    assert render_model_card(facts) == here


@pytest.mark.parametrize(
    ("start", "teacher_id", "expected"),
    [
        (["nvidia/mit-b0"], None, ["nvidia/mit-b0"]),
        (["nvidia/mit-b0"], "someone/teacher", ["nvidia/mit-b0", "someone/teacher"]),
        ([], "someone/teacher", ["someone/teacher"]),
        (["someone/teacher"], "someone/teacher", ["someone/teacher"]),
        (["/home/me/checkpoint-5"], None, None),
    ],
)
def test_base_models_are_the_start_and_the_teacher_and_never_a_merge(start, teacher_id, expected):
    # Without base_model_relation the Hub takes a list of two for a merge.
    data = ModelCard(render_model_card(replace(DISTILLED, base_model=start, teacher_id=teacher_id))).data
    assert data.base_model == expected
    assert data.get("base_model_relation") == ("finetune" if expected else None)


def test_two_protocols_of_one_split_are_told_apart_by_name():
    eroded = replace(RESULT, protocol="borders left out", metrics={"mean_iou": 0.8})
    data = ModelCard(render_model_card(replace(DISTILLED, results=[RESULT, eroded]))).data
    found = {entry.metric_name: entry.metric_value for entry in data.eval_results if entry.metric_type == "mean_iou"}
    assert found == {"mIoU (test, tiles of 256, each pixel once)": 0.75321, "mIoU (test, borders left out)": 0.8}
    with pytest.raises(UserError, match="name what differs in the protocol"):
        render_model_card(replace(DISTILLED, results=[RESULT, RESULT]))


def test_red_green_blue_is_called_rgb():
    for bands in ((), ("red", "green", "blue")):
        assert "Pictures are read as RGB at" in render_model_card(replace(PLAIN, bands=bands))


def test_bands_that_are_not_normalised_have_no_statistics():
    card = render_model_card(replace(DISTILLED, image_mean=(), image_std=()))
    assert "| | Band |\n|---:|---|\n| 1 | near_infrared |\n| 2 | red |" in card and "normalises" not in card


def test_every_band_needs_its_statistics():
    with pytest.raises(UserError, match="image_mean: 2 values for 3 bands"):
        render_model_card(replace(DISTILLED, image_mean=[0.5, 0.5]))


def test_pictures_are_not_promised_to_models_of_five_bands():
    card = render_model_card(replace(PLAIN, bands=["red", "green", "blue", "near_infrared", "height\n```"]))
    assert "import pipeline" not in card and "Pictures" not in card
    assert "image = file.read()  # uint8 (5, H, W): red, green, blue, near_infrared, height ```\n" in card
    assert "\n\n\n" not in card


def test_every_class_needs_a_colour():
    with pytest.raises(UserError, match="1 colours for 2 classes"):
        render_model_card(replace(PLAIN, colors=[(0, 0, 0)]))


def test_kept_facts_are_the_same_facts(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"results": {}, "card": facts_to_json(DISTILLED)}))
    facts = read_facts(tmp_path)
    assert render_model_card(facts) == EXPECTED
    for entry in fields(ModelCardFacts):  # each is kept, also one that this card does not show
        default = PLAIN if entry.name in ("tags", "results") else DISTILLED
        assert (getattr(facts, entry.name) == getattr(PLAIN, entry.name)) == (
            getattr(default, entry.name) == getattr(PLAIN, entry.name)
        ) or getattr(facts, entry.name), entry.name
    renamed = replace(facts, model_name="org/other")
    assert render_model_card(renamed) == EXPECTED.replace("someone/tiny-potsdam", "org/other")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no finished run, it has no run.json"),
        ("{", "run.json: is damaged"),
        ("[]", "run.json: is no record of a run"),
        ('{"results": {}}', "an older version finished this run and kept no facts .* make_card.py --run .* --dataset"),
        ('{"card": {"model_name": "x"}}', "damaged or of another version .* make_card.py"),
        ('{"card": []}', "damaged or of another version"),
        (json.dumps({"card": facts_to_json(PLAIN) | {"colour": 1}}), "damaged or of another version .*colour"),
        (json.dumps({"card": facts_to_json(PLAIN) | {"id2label": {"1": "a"}}}), "other keys than 0..K-1"),
        (json.dumps({"card": facts_to_json(PLAIN) | {"model_name": 5}}), "model_name is 5"),
    ],
)
def test_a_folder_without_facts_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_facts(tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="there is no such folder"):
        read_facts(tmp_path / "nothing")


def test_write_replaces_the_card_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "model"
    write_model_card(folder, PLAIN)
    path = write_model_card(folder, DISTILLED)
    assert path == folder / "README.md" and path.read_text(encoding="utf-8") == EXPECTED
    assert [entry.name for entry in folder.iterdir()] == ["README.md"]


def test_a_card_that_cannot_be_rendered_leaves_the_old_one(tmp_path):
    write_model_card(tmp_path, PLAIN)
    with pytest.raises(UserError):
        write_model_card(tmp_path, replace(DISTILLED, colors=[]))
    assert (tmp_path / "README.md").read_text() == render_model_card(PLAIN)


def test_the_code_in_the_card_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    id2label = dict(PLAIN.id2label)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
        id2label=id2label, label2id={name: i for i, name in id2label.items()},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained("tiny")
    SegformerImageProcessor(do_resize=False).save_pretrained("tiny")
    Image.new("RGBA", (96, 64)).save("tile.png")
    blocks = re.findall(r"```python\n(.*?)```", render_model_card(PLAIN), re.DOTALL)
    assert len(blocks) == 3
    with rasterio.open(
        "orthophoto.tif", "w", driver="GTiff", width=70, height=50, count=3, dtype="uint8",
        crs="EPSG:32633", transform=rasterio.Affine(0.5, 0, 500000, 0, -0.5, 5800000),
    ) as file:  # fmt: skip
        file.write(np.zeros((3, 50, 70), np.uint8))
    names = {}
    for block in blocks:
        exec(block, names)
    assert "(96, 64)" in capsys.readouterr().out
    assert tuple(names["label"].shape) == (64, 96)
    assert not torch.is_floating_point(names["label"])
    with rasterio.open("classes.tif") as file:
        assert file.shape == (50, 70) and file.crs == "EPSG:32633" and set(np.unique(file.read(1))) <= set(id2label)


def test_an_older_run_without_a_method_was_distilled_with_the_plain_form(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    script = importlib.import_module("scripts.make_card")
    models = {
        "model": SimpleNamespace(model=tiny_model("segformer")),
        "teacher": SimpleNamespace(model=tiny_model("upernet")),
    }
    args = script.CardArguments(run="runs/x", dataset="data/x", teacher="runs/t")
    older = {"settings": {"teacher": "runs/t", "student": "s", "channel_relation_weight": 5.0}}
    distillation = script.origins_of_older_run(args, older, models).distillation
    assert distillation["spatial_relation weight"] == 3.0 and distillation["channel_relation weight"] == 5.0
