"""`--plugin`, which every command takes: files that add samplers, codecs, metrics and so on."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Load a plugin: a Python file, or an installed one's name; may be repeated.",
    ),
]


def accept(app: typer.Typer) -> None:
    """Give every command of an application, and of its groups, the option."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = _accepting(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            accept(group.typer_instance)


def _accepting(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run(*arguments: Any, plugin: list[str] | None = None, **options: Any) -> Any:
        if plugin:
            from msmdiff.core import registry

            for spec in plugin:
                registry.load_plugin(spec)
        return command(*arguments, **options)

    own = inspect.signature(command)
    extra = inspect.Parameter(
        "plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Plugins
    )
    parameters = [*own.parameters.values(), extra]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "plugin": Plugins}
    return run
