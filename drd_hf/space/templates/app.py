"""The app of this Space. What it serves is in space.json, how is in drd_hf/space/app.py."""

from pathlib import Path

from drd_hf.errors import run_script
from drd_hf.space.app import serve

if __name__ == "__main__":
    run_script(lambda: serve(Path(__file__).resolve().parent))
