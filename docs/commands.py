"""The command reference: options of ``fit`` from where they are described, of other commands from
the commands themselves."""

from __future__ import annotations

from typing import Any

import typer

from stem_fast.cli import app
from stem_fast.common import Option
from stem_fast.training.options import OPTIONS


def reference() -> str:
    """Markdown: a section a command."""
    root = typer.main.get_command(app)
    parts = []
    for name, command in commands(root).items():
        usage = f"stem-fast {name}"
        parts += [f"## {usage}", (command.help or "").strip()]
        parts.append(fit_options() if name == "fit" else table(command))
    return "\n\n".join(parts)


def commands(root: Any, before: str = "") -> dict[str, Any]:
    """All commands by what is typed for them; a group that does something itself is one too."""
    found = {}
    for name, command in root.commands.items():
        full = f"{before}{name}"
        if not getattr(command, "commands", None) or command.invoke_without_command:
            found[full] = command
        if getattr(command, "commands", None):
            found |= commands(command, f"{full} ")
    return found


def fit_options() -> str:
    """The options of ``fit`` by panel."""
    parts = [
        "`--config FILE` reads any of these from a YAML file, under its key; flags override it. "
        "A list is comma-separated text, and a flag of a list may be given several times."
    ]
    for panel in dict.fromkeys(option.panel for option in OPTIONS.values()):
        parts.append(f"### {panel}")
        rows = [["Flag and key", "Type", "Default", "Meaning"]]
        for name, option in OPTIONS.items():
            if option.panel == panel:
                flags = option.flags or (f"--{name.replace('_', '-')}",)
                names = "<br>".join(f"`{each}`" for each in (*flags, name))
                rows.append([names, kind_of(option), shown(option.shown), option.help])
        parts.append(markdown(rows))
    return "\n\n".join(parts)


def shown(default: Any) -> str:
    """A default: a value as code, an explanation as it is."""
    if isinstance(default, bool) or not isinstance(default, (str, int, float)):
        return ""
    return str(default) if " " in str(default) else f"`{default}`"


def kind_of(option: Option) -> str:
    name = {str: "text", int: "integer", float: "number", bool: "flag"}[option.kind]
    if not option.many:
        return name
    return f"list, `{option.metavar}`" if option.metavar else "list"


def table(command: Any) -> str:
    """Arguments and options of a command."""
    rows = [["Argument", "Default", "Meaning"]]
    for each in command.params:
        if each.name in ("help", "version"):
            continue
        option = each.param_type_name == "option"
        name = " ".join([*each.opts, *each.secondary_opts]) if option else each.metavar or each.name
        default = "needed" if each.required and option else shown(each.default)
        rows.append([f"`{name}`", default, getattr(each, "help", "") or ""])
    return markdown(rows) if len(rows) > 1 else "It takes no options."


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
