import os
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from drd_hf.cards import MeasuredResult, ModelCardFacts, Timing, hub_id, render_model_card, write_model_card
from drd_hf.errors import UserError

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
    dataset_license="no redistribution, see https://www.isprs.org/terms",
    dataset_citation="Rottensteiner et al. 2012",
    teacher="/data/runs/teacher-b2/",
    teacher_num_parameters=27_000_000,
    results=[RESULT],
    distillation={"relation": "cosine", "feature_layers": ["stages.2", "stages.3"], "weights": {"spatial": 1.0}},
    training={"learning_rate": 6e-05, "output_dir": "/home/someone/my runs/out"},
    seed=0,
    steps=100,
    hardware="2 CPU cores",
    versions={"drd_hf": "0.1.0", "torch": "2.15"},
    command="accelerate launch scripts/distill.py --config scripts/configs/a.yaml --output_dir='/home/someone/my runs/out'",
    timing=Timing(12.34, 256, "1 CPU core"),
)
EXPECTED = """\
---
base_model:
- nvidia/mit-b0
datasets:
- someone/potsdam
library_name: transformers
license: apache-2.0
pipeline_tag: image-segmentation
tags:
- semantic-segmentation
- knowledge-distillation
- dual-relation-distillation
- remote-sensing
- isprs
model-index:
- name: someone/tiny-potsdam
  results:
  - task:
      type: image-segmentation
      name: Semantic segmentation
    dataset:
      name: ISPRS Potsdam
      type: someone/potsdam
      split: test
    metrics:
    - type: mean_iou
      value: 0.75321
      name: mIoU (test, tiles of 256, each pixel once)
    - type: mean_f1
      value: 0.85
      name: mean F1 (test, tiles of 256, each pixel once)
    - type: mean_accuracy
      value: 0.84
      name: mean accuracy (test, tiles of 256, each pixel once)
    - type: overall_accuracy
      value: 0.9
      name: overall accuracy (test, tiles of 256, each pixel once)
    - type: kappa
      value: 0.87
      name: Cohen's kappa (test, tiles of 256, each pixel once)
    - type: iou_building
      value: 0.8
      name: IoU of building (test, tiles of 256, each pixel once)
    - type: iou_low_vegetation
      value: 0.70642
      name: IoU of low_vegetation (test, tiles of 256, each pixel once)
    - type: f1_building
      value: 0.89
      name: F1 of building (test, tiles of 256, each pixel once)
    - type: f1_low_vegetation
      value: 0.81
      name: F1 of low_vegetation (test, tiles of 256, each pixel once)
    - type: accuracy_building
      value: 0.9
      name: accuracy of building (test, tiles of 256, each pixel once)
---

# someone/tiny-potsdam

A semantic segmentation model for aerial images: `TinyModel` with 1,234 parameters, trained on [ISPRS Potsdam](https://huggingface.co/datasets/someone/potsdam), distilled from teacher-b2 (27,000,000 parameters) with Dual Relation Distillation.
It is an ordinary `transformers` checkpoint: nothing else is needed to use it.

## Results

Scores are fractions of 1, from one confusion matrix over all counted pixels. All columns of a table were measured with the same protocol. "Student alone" is the same model trained without a teacher.

**ISPRS Potsdam, test: tiles of 256, each pixel once**

| | This model | Teacher | Student alone |
|---|---:|---:|---:|
| mIoU | 0.7532 | 0.7800 | 0.7300 |
| mean F1 | 0.8500 | – | – |
| mean accuracy | 0.8400 | – | – |
| overall accuracy | 0.9000 | 0.9100 | – |
| Cohen's kappa | 0.8700 | – | – |
| parameters | 1,234 | 27,000,000 | 1,234 |

| Class | IoU | F1 | accuracy |
|---|---:|---:|---:|
| building | 0.8000 | 0.8900 | 0.9000 |
| low_vegetation | 0.7064 | 0.8100 | – |

One tile of 256 x 256 pixels takes 12.3 ms (measured on 1 CPU core).

## Classes

| Label | Class | Colour (RGB) |
|---:|---|---|
| 0 | building | 0, 0, 255 |
| 1 | low_vegetation | 0, 255, 255 |

Pixels with the label 255 were ignored.

## Input

8-bit images with these 3 bands in this order; the image processor scales values to 0..1 and normalises each band. The names are in `config.json` as `bands`.

| | Band | mean | standard deviation |
|---:|---|---:|---:|
| 1 | near_infrared | 0.5000 | 0.2000 |
| 2 | red | 0.2500 | 0.2000 |
| 3 | green | 0.1250 | 0.1000 |

## How it was distilled

Dual Relation Distillation aligns the spatial and channel relation maps of the student's features with those of the teacher's. It is needed in training only and costs nothing at inference.

| Setting | Value |
|---|---|
| relation | `cosine` |
| feature_layers | `stages.2, stages.3` |
| weights | `spatial: 1.0` |

This is an independent implementation. The abstract of the paper does not give its exact settings; the settings of this model are our own.

## How it was trained

| Setting | Value |
|---|---|
| learning_rate | `6e-05` |
| output_dir | `out` |
| steps | `100` |
| seed | `0` |

Hardware: 2 CPU cores.

Versions: drd_hf 0.1.0, torch 2.15.

```bash
accelerate launch scripts/distill.py --config scripts/configs/a.yaml --output_dir='out'
```

## How to use

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="someone/tiny-potsdam")
for region in segment("tile.png"):
    print(region["label"], region["mask"].size)
```

or, for a map of class ids,

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("someone/tiny-potsdam")
model = AutoModelForSemanticSegmentation.from_pretrained("someone/tiny-potsdam").eval()
image = Image.open("tile.png").convert("RGB")
with torch.inference_mode():
    outputs = model(**processor(images=image, return_tensors="pt"))
label = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]  # (H, W) class ids
```

Pictures are read with near_infrared, red, green in the place of red, green, blue, at their native resolution. Cut large pictures into tiles, or let `drd_hf.predict_image` do it.

## Limits

- The model knows only the classes above. Other sensors, bands, ground sampling distances, regions and seasons than those named here were not tested: measure before you rely on it.
- Resample pictures with another ground sampling distance to that of the training data.
- Scores depend on the protocol (tiles, borders, classes in the mean); compare only numbers with the same one.

## Terms of the data

Terms of ISPRS Potsdam: no redistribution, see https://www.isprs.org/terms

Cite the data as: Rottensteiner et al. 2012

## Citation

```bibtex
@misc{li2025dualrelation,
  title  = {Building Lightweight Semantic Segmentation Models for Aerial Images Using Dual Relation Distillation},
  author = {Li and Shan and Wang and Lv and Luo and Chen},
  year   = {2025},
  eprint = {2506.20688},
  archivePrefix = {arXiv},
}
```
"""


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
    card = render_model_card(replace(DISTILLED, distillation=None, teacher=None, results=[], model_name="plain"))
    assert not re.search("distill(ed|ation)|teacher|2506.20688", card.replace("scripts/distill.py", ""), re.IGNORECASE)
    assert "Citation" not in headings(card)


def test_a_model_distilled_with_other_losses_does_not_claim_the_method():
    card = render_model_card(replace(DISTILLED, dual_relation=False))
    assert "How it was distilled" in headings(card) and "Citation" not in headings(card)
    assert not re.search("dual.relation", card, re.IGNORECASE)
    assert "knowledge-distillation" in ModelCard(card).data.tags


@pytest.mark.parametrize(
    ("facts", "gone"),
    [
        ({"results": [], "timing": None}, ["Results"]),
        ({"bands": (), "image_mean": (), "image_std": ()}, ["Input"]),
        ({"dataset_license": None, "dataset_citation": None}, ["Terms of the data"]),
        (
            {"training": {}, "seed": None, "steps": None, "hardware": None, "versions": {}, "command": None},
            ["How it was trained"],
        ),
    ],
)
def test_only_the_section_whose_facts_are_missing_vanishes(facts, gone):
    card = render_model_card(replace(DISTILLED, **facts))
    assert headings(card) == [heading for heading in headings(EXPECTED) if heading not in gone]
    assert "\n\n\n" not in card


@pytest.mark.parametrize("facts", [{"dataset_license": None}, {"dataset_citation": None}, {"timing": None}])
@pytest.mark.parametrize("more", [{}, {"distillation": {}}, {"colors": None}, {"command": None}, {"training": {}}])
def test_blank_lines_stay_single_whichever_fact_is_missing(facts, more):
    card = render_model_card(replace(DISTILLED, **facts, **more))
    assert "\n\n\n" not in card and "\n\n" in card
    assert all(card[m.start() - 2 : m.start()] == "\n\n" for m in re.finditer("^## ", card, re.MULTILINE))


def test_a_teacher_on_the_hub_is_linked():
    card = render_model_card(replace(DISTILLED, teacher="someone/teacher"))
    assert "distilled from [someone/teacher](https://huggingface.co/someone/teacher)" in card


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
        versions=settings, timing=Timing(1.0, 256, NASTY),
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
        results=[replace(RESULT, dataset=path, split=path, protocol=f"from '{path}'")], timing=Timing(1, 1, f"'{path}'"),
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
    card = render_model_card(replace(DISTILLED, teacher="runs/teacher", base_model=["runs/teacher"]))
    assert "distilled from teacher (" in card and "base_model" not in card and "runs/teacher" not in card
    assert hub_id("teacher") is None and hub_id(None) is None and hub_id("a/b/c") is None


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
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert "(96, 64)" in capsys.readouterr().out
    assert tuple(names["label"].shape) == (64, 96)
    assert not torch.is_floating_point(names["label"])
