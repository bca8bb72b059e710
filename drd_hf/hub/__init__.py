"""To the Hugging Face Hub: everything that belongs together in one commit, and nothing else.

`push_dataset` and `push_model` know what belongs to a prepared dataset and to a trained model; `push_files` knows the
Hub. `check_push` and `check_model_push` say before hours of work what these would refuse after them.
"""

_EXPORTS = {
    "check_access": "client",
    "push_files": "client",
    "check_push": "datasets",
    "push_dataset": "datasets",
    "PushedModel": "models",
    "check_model_push": "models",
    "model_files": "models",
    "push_model": "models",
    "check_space_push": "spaces",
    "push_space": "spaces",
    "write_model_space": "spaces",
    "check_widget_ready": "widget",
}

__all__ = list(_EXPORTS)


def __getattr__(name):  # imports what is used: the converter does not wait for transformers
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
