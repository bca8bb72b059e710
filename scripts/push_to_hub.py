"""Push the model of a finished run to the Hugging Face Hub in one commit, and an app to try it if you want one.

python scripts/push_to_hub.py --model runs/student --repo_id ORG/NAME --dry_run
python scripts/push_to_hub.py --model runs/student --repo_id ORG/NAME --private
python scripts/push_to_hub.py --model runs/student --repo_id ORG/NAME --space

Pushed are weights, configuration, image processor, card and the pictures of the card; nothing else of the run. The token
is the one of `hf auth login`, or HF_TOKEN.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from drd_hf.errors import run_script
from drd_hf.hub import check_space_push, check_widget_ready, push_model, push_space, write_model_space


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="Output folder of distill.py or train_teacher.py.")
    add("--repo_id", required=True, help="Repository of the model as ORG/NAME; made if it does not exist.")
    privacy = parser.add_mutually_exclusive_group()
    privacy.add_argument("--private", action="store_const", const=True, help="Only who may see it finds it.")
    privacy.add_argument("--public", action="store_const", const=False, dest="private", help="Everybody finds it.")
    add("--overwrite", action="store_true", help="Replace something else that is in the repository.")
    add("--dry_run", action="store_true", help="Check the run and list the files, push nothing; needs no token.")
    add(
        "--space",
        metavar="ORG/NAME",
        nargs="?",
        const="",
        help="Push also a Gradio Space for the model. Default: a Space of the name of the model.",
    )
    add("--space_dir", type=Path, help="Only write the Space into this new folder, and push nothing.")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.space_dir:
        files = write_model_space(args.space_dir, args.model, args.repo_id)
        print(f"{len(files)} files; to try it once {args.repo_id} is on the Hub: python {args.space_dir / 'app.py'}")
        return
    space = None if args.space is None else args.space or args.repo_id
    options = {"private": args.private, "overwrite": args.overwrite}
    list_files(push_model(args.model, args.repo_id, dry_run=True).sizes, args.repo_id)
    for problem in check_widget_ready(args.model):
        print(f"the widget of the Hub will not work as it should: {problem}", file=sys.stderr)
    if args.dry_run:
        if space:
            with tempfile.TemporaryDirectory() as temporary:
                files = write_model_space(Path(temporary) / "space", args.model, args.repo_id)
                list_files({name: path.stat().st_size for name, path in files.items()}, f"spaces/{space}")
        return
    if space:
        check_space_push(args.repo_id, space, **options)
    print(f"pushed to {push_model(args.model, args.repo_id, **options).url}")
    if space:
        print(f"pushed to {push_space(args.model, args.repo_id, space, **options)}")


def list_files(sizes: dict[str, int], repo: str) -> None:
    print(f"{repo}: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB")
    for name, size in sorted(sizes.items()):
        print(f"{size:>12,}  {name}")


if __name__ == "__main__":
    run_script(main)
