"""What is said to a flag that there is not: many are keys of the configuration."""

from typing import Any

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command that knows which unknown flags are keys."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UsageError with the key's `--set` for an unknown flag that is one."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            flag = getattr(error, "option_name", None)
            if type(error).__name__ != "NoSuchOption" or flag is None:
                raise
            takes_sets = any("--set" in parameter.opts for parameter in self.params)
            if takes_sets and (keys := _keys(str(flag))):
                from msmdiff.core.errors import UsageError

                shown = " or ".join(f"--set {key}=..." for key in keys[:3])
                raise UsageError(f"{flag} is no flag of {self.name}, but a key: {shown}") from None
            raise


def _keys(flag: str) -> list[str]:
    """The keys of the configuration that a flag may mean: `--weight-decay`, `--optim.lr`."""
    from msmdiff.core import registry
    from msmdiff.core.layers import SECTIONS

    wanted = flag.lstrip("-").replace("-", "_")
    known: list[str] = []
    for name, section in SECTIONS.items():
        fields = list(section.model_fields)
        # A model's options are those of its family, which its name may tell.
        for kind in ["backbone"] if name == "model" else section.CHOICES.values():
            for entry in registry.entries(kind).values():
                fields += entry.options.model_fields
        known += [f"{name}.{key}" for key in dict.fromkeys(fields)]
    return [key for key in known if key == wanted or key.partition(".")[2] == wanted]


def give(app: typer.Typer) -> None:
    """Let every command of an application, and of its groups, answer so."""
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            give(group.typer_instance)
