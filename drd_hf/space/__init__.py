"""A Gradio Space for one model: upload an image of any size, see its classes, take the class map home.

python -m drd_hf.space runs/student                   # try it on this machine (extra: space)
python -m drd_hf.space ORG/NAME --output space        # only write the folder, to look at it or to push it
"""

__all__ = ["write_space"]


def __getattr__(name):  # a Space brings what it runs, and not what writes Spaces
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(".write", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
