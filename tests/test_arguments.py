from dataclasses import dataclass, field

import pytest

from drd_hf.arguments import parse_arguments
from drd_hf.errors import UserError
from drd_hf.trainer import DistillationConfig


@dataclass
class Options:
    name: str = field(default="x", metadata={"help": "a name"})
    rate: float = field(default=1.0, metadata={"help": "a rate"})
    sizes: list[int] | None = field(default=None, metadata={"help": "sizes"})
    flag: bool = field(default=False, metadata={"help": "a flag"})


def parse(*argv):
    return parse_arguments(Options, description="test", argv=list(argv))[0]


def test_file_gives_defaults_and_the_command_line_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: from file\nrate: 1e-3\nsizes: [1, 2]\nflag: true\n")
    assert parse("--config", str(path)) == Options("from file", 1e-3, [1, 2], True)  # YAML reads 1e-3 as text
    assert parse("--config", str(path), "--name", "mine", "--sizes", "7", "--flag", "false") == Options(
        "mine", 1e-3, [7], False
    )


def test_null_in_the_file_keeps_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text("sizes: null\n")
    assert parse("--config", str(tmp_path / "c.yaml")).sizes is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: 1\n", "unknown key 'nmae'; nearest: name"),
        ("- 1\n", "flat mapping"),
        ("a: [1\n", "not valid YAML"),
        ("rate: fast\n", "invalid float value: 'fast'"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse("--config", str(path))
    assert "\n" not in str(caught.value)


def test_wrong_options_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="unknown option --nam; nearest: name"):
        parse("--nam", "x")
    with pytest.raises(UserError, match="invalid float"):
        parse("--rate", "fast")
    with pytest.raises(UserError, match="cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_yaml_tags_that_build_objects_are_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        parse("--config", str(tmp_path / "c.yaml"))


def test_training_arguments_parse_with_our_defaults(tmp_path):
    (args,) = parse_arguments(
        DistillationConfig,
        description="test",
        argv=["--output_dir", str(tmp_path), "--channel_relation_weight", "3", "--feature_layers", "a=b", "c"],
    )
    assert (args.channel_relation_weight, args.feature_layers, args.remove_unused_columns) == (
        3.0,
        ["a=b", "c"],
        False,
    )
