import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import drd_hf

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", drd_hf.__all__)
def test_public_names_import_and_have_docstrings(name):
    value = getattr(drd_hf, name)
    assert value.__doc__ and len(value.__doc__.strip()) > 20


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module("drd_hf").no_such_name  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, drd_hf; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_import_of_the_package_is_a_declared_dependency():
    settings = (ROOT / "setup.cfg").read_text()
    blocks = [
        re.search(rf"^{key} =\n((?:    .+\n)+)", settings, re.M).group(1)
        for key in ("install_requires", "onnx", "vector", "space")
    ]
    declared = {re.split(r"[<>=]", line.strip())[0].lower().replace("-", "_") for line in "".join(blocks).splitlines()}
    names = {"pyyaml": "yaml", "pillow": "PIL"}
    allowed = {names.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {"drd_hf"}
    for path in [*(ROOT / "drd_hf").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                root = module.split(".")[0]
                assert root in allowed, f"{path} imports {root}, which setup.cfg does not declare"
