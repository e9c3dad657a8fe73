"""The command line, `idlm`. Each command imports torch and the model code when it runs, not before."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from idlm_kernels._version import __version__
from idlm_kernels.cli import chat, convert, doctor, evaluate, generate, learn, serve, train_adapter, warm
from idlm_kernels.cli.errors import EXIT_BAD_INPUT

# Plain help and plain tracebacks: rich's own are slower to load and print a bug over a hundred lines.
app = typer.Typer(
    name="idlm",
    help="Decode with Introspective Diffusion Language Models: strided, and token for token what "
    "autoregressive decoding gives.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(train_adapter.train_adapter)
app.command()(learn.learn)
app.command()(convert.convert)
app.command("eval", context_settings=evaluate.CONTEXT, add_help_option=False)(evaluate.evaluate)
app.command()(doctor.doctor)
app.command()(warm.warm)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"idlm_kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _idlm(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _open_streams() -> None:
    """Give a closed stdin, stdout or stderr the null device: else the next file opened would take its number, and
    Python would print to stdout what is meant for stderr."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is fd
    if sys.stdin is None:
        sys.stdin = open(0)  # noqa: SIM115 - open as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w")  # noqa: SIM115
    if sys.stdout is None:
        print("idlm: error: stdout is closed, so there is nowhere to write to", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def main() -> None:
    """The console script. Exit status: 0, 1 for a failed --check, 2 for bad input, 3 where the machine failed and
    the same command goes on, 130 for Ctrl-C."""
    _open_streams()
    # Torch's threads wait for each other by spinning, for good as GNU OpenMP has it. Where other programs use the cores
    # too, that made a decode 10 to 20 times slower; a short spin costs nothing on a quiet machine (measured with the
    # default model on two cores: 50 tokens/s either way). Read by OpenMP when torch is imported, that is later.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    app(prog_name="idlm")
