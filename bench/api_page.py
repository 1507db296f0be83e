"""`python -m bench.api_page`: docs/api.md, from the docstrings of what users import."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEADER = """# API

Written by `python -m bench.api_page` from the docstrings. Formulas and words: [architecture.md](architecture.md); options in detail:
[policies.md](policies.md), [generate.md](generate.md), [capture.md](capture.md).
"""
# Heading, module, names. Names of `fastguard` itself are read from its __all__.
SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Guarding a pipeline", "fastguard", ("enable", "Guard", "Report", "ImageReport")),
    ("Policies", "fastguard", ("policy", "PRESETS", "Policy")),
    ("Gates", "fastguard.pipelines.statistics", ("collect_gate_statistics",)),
    ("", "fastguard.policies.gate", ("calibrate", "Calibration")),
    ("Prompt files to images", "fastguard", ("generate",)),
    ("Options of generate", "fastguard.batch.options", ("JobOptions",)),
    ("Host synchronisations", "fastguard", ("find_syncs", "assert_sync_free", "SyncReport")),
    ("The embedded model", "fastguard.testbed", ("load", "prompts", "policy_path", "concepts", "training_images", "Prompt")),
    ("Without a pipeline", "fastguard.schedules.compiler", ("compile_schedule",)),
    ("", "fastguard.policies.plan", ("lower",)),
    ("", "fastguard.loop.loop", ("Loop",)),
    ("", "fastguard.loop.guide", ("Guide",)),
    ("Other ways in", "fastguard.fronts.guider", ("GuardedGuidance",)),
)  # fmt: skip


def page() -> str:
    parts = [HEADER]
    for heading, module, names in SECTIONS:
        if heading:
            parts.append(f"## {heading}\n")
        parts += [entry(module, name) for name in names]
    return "\n".join(parts)


def entry(module: str, name: str) -> str:
    """One public name: signature, docstring and, of a class, its public methods."""
    thing = getattr(importlib.import_module(module), name)
    lines = [f"### `{module}.{name}`\n"]
    if not callable(thing):
        return "\n".join([*lines, "Names: " + ", ".join(f"`{key}`" for key in thing) + ".\n"])
    lines.append(_block(f"{name}{_signature(thing)}", inspect.getdoc(thing)))
    if dataclasses.is_dataclass(thing) and (fields := _fields(thing)):
        lines.append(fields)
    for key, member in vars(thing).items() if inspect.isclass(thing) else ():
        target = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not key.startswith("_") and inspect.isfunction(target) and target.__doc__:
            shown = key if isinstance(member, property) else f"{key}{_signature(getattr(thing, key))}"
            lines.append(_block(f"{name}.{shown}", inspect.getdoc(target)))
    return "\n".join(lines)


def _fields(kind: Any) -> str:
    """A table of the fields that say what they are for."""
    told = [(f.name, f.default, f.metadata["help"]) for f in dataclasses.fields(kind) if "help" in f.metadata]
    rows = [f"| `{name}` | `{default!r}` | {text} |" for name, default, text in told]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows, ""]) if rows else ""


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    text = text.replace("'", "").replace("(self, ", "(").replace("(self)", "()")
    return re.sub(r"\b(?:fastguard|torch|typing|collections\.abc|pathlib|os)\.(?:\w+\.)*(?=[A-Z])", "", text)


def _block(title: str, text: str | None) -> str:
    return f"```text\n{title}\n\n{text or ''}\n```\n".replace("\n\n\n```", "\n```")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
