"""Try a model in the browser, or write its Space."""

import argparse
import os
import tempfile
from pathlib import Path

from drd_hf.errors import UserError, run_script
from drd_hf.space.write import write_space

DESCRIPTION = """Try a model in the browser, or write its Space.

python -m drd_hf.space runs/student
python -m drd_hf.space runs/student --examples images/ --port 7861
python -m drd_hf.space ORG/NAME --output space
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m drd_hf.space", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="Folder or Hub id of a semantic segmentation model.")
    add("--title", help="Of the page. Default: the name of the model.")
    add("--examples", nargs="+", help="Images to pick from. Default: those in the folder `examples` of the model.")
    add("--license", help="Identifier for the card of the Space. Default: none.")
    add("--output", type=Path, help="Only write the Space, into this new folder.")
    add("--port", type=int, help="Where the page is served, or the next port that is free. Default: 7860.")
    args = parser.parse_args()
    options = {"title": args.title, "examples": args.examples, "license": args.license}
    if args.output:
        files = write_space(args.output, args.model, **options)
        print(f"{len(files)} files in {args.output}; try it: python {args.output / 'app.py'}")
        return
    if args.port:
        os.environ["GRADIO_SERVER_PORT"] = str(args.port)
    try:
        from drd_hf.space.app import serve
    except ImportError as error:
        raise UserError(f"the Space needs {error.name}: pip install drd-hf[space]") from error
    with tempfile.TemporaryDirectory() as temporary:
        write_space(Path(temporary) / "space", args.model, **options)
        serve(Path(temporary) / "space")


if __name__ == "__main__":
    run_script(main)
