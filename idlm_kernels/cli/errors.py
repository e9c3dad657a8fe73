"""How commands fail: one line on stderr and an exit status that scripts can tell apart."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

EXIT_MISMATCH = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3  # by a fault of the machine; the same command goes on
EXIT_INTERRUPTED = 130


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Decorator of a command: errors that input can cause become one line and status 2, Ctrl-C status 130.

    The library raises ValueError and OSError for input; anything else is a bug and keeps its traceback. With
    IDLM_TRACEBACK=1 in the environment all errors do.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        raise  # the reader of stdout has left (`| head`): typer ends the program quietly
    except (ValueError, OSError) as error:
        if os.environ.get("IDLM_TRACEBACK", "0") != "0":
            raise
        print("idlm: error:", " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from None
