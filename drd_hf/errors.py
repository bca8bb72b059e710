"""The one exception that means "the input is wrong", and how a script reports it."""

import sys
import time
from collections.abc import Callable
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input: the message is one line that names the file, layer or option and says what to do."""

    def __init__(self, message: str = ""):
        # A DataLoader raises the errors of its worker processes anew, their traceback as the message.
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rpartition(f"\n{__name__}.{type(self).__qualname__}: ")[2].strip() or message
        super().__init__(message)


def nearest(name: str, known, n: int = 5) -> str:
    """The `known` names most like `name`, comma separated, for an error message."""
    known = list(known)
    return ", ".join(get_close_matches(name, known, n=n, cutoff=0.3) or known[:n])


def leave_process_group() -> None:
    """Leave the process group of several processes, if there is one: a process that exits while its threads run may abort.

    A moment before, threads get to free the tensors of the last operation, for which they need the interpreter's lock. Leaving
    waits for these threads, in torch 2.6 with the lock held: for ever.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        time.sleep(0.2)
        distributed.destroy_process_group()


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit status 2.

    The process group of several processes is left at the end.
    """
    try:
        main()
        leave_process_group()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
