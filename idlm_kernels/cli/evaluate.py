"""`idlm eval`: the command line of lm-evaluation-harness, which knows the model `idlm` here."""

from __future__ import annotations

import sys

import typer

from idlm_kernels.cli.errors import reported

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
_COMMANDS = ("run", "ls", "validate")


@reported()
def evaluate(context: typer.Context) -> None:
    """Run lm-evaluation-harness (lm_eval) on a model: idlm eval --model_args pretrained=default --tasks arc_easy."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import idlm_kernels.evaluation  # noqa: F401 - registers the model, for versions without entry points
    except ModuleNotFoundError as error:
        raise ValueError(f"idlm eval needs the package {error.name}: pip install 'idlm_kernels[eval]'") from None
    given = list(context.args)
    command = [given.pop(0)] if given and given[0] in _COMMANDS else ["run"]
    if command == ["run"] and not any(one.split("=")[0] in ("--model", "-M") for one in given):
        command += ["--model", "idlm"]
    sys.argv = ["lm_eval", *command, *given]
    cli_evaluate()
