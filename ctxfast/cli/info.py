"""`ctxfast info`: versions, devices, operators with their implementations, environment."""

from __future__ import annotations

import json as json_module
from typing import Any

from ctxfast.cli.errors import Debug, Json


def info(json: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, and which implementation of each operator runs, or why not."""
    from ctxfast.info import collect

    facts = collect()
    print(json_module.dumps(facts) if json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = ["versions"]
    lines += [f"  {name:14}{value or '-'}" for name, value in facts["versions"].items()]
    cpu = facts["cpu"]
    lines += ["", "cpu"]
    lines.append(f"  {'model':14}{cpu['model']}")
    lines.append(f"  {'threads':14}{cpu['threads']} of {cpu['cores'] or '?'} cores")
    lines.append(f"  {'isa':14}{cpu['isa'] or '-'} (of {', '.join(cpu['available_isas']) or '-'})")
    lines += ["", "cuda"]
    lines += [
        f"  {number:<14}{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        for number, gpu in enumerate(facts["cuda"])
    ] or ["  no device"]
    lines += ["", "native modules"]
    for half in ("cpu", "cuda"):
        module, built = facts["native"][half], facts["native"]["build"].get(half, {})
        lines.append(f"  {half:14}{module['path'] or 'absent'}")
        if built.get("compiler"):
            lines.append(f"  {'':14}built with {built['compiler']}")
        if module["reason"]:
            lines += [f"  {'':14}{line}" for line in module["reason"].splitlines()]
    for device, operators in facts["operators"].items():
        lines += ["", f"operators on {device} (backend {facts['backend']})"]
        for operator, implementations in sorted(operators.items()):
            runs = next((name for name, why in implementations.items() if why is None), "nothing")
            lines.append(f"  {operator}: {runs} runs")
            for name, reason in implementations.items():
                text = " ".join(reason.split()) if reason else "available"
                lines.append(f"    {name:12}{_shortened(text)}")
    lines += ["", "environment"]
    lines += [
        f"  {entry['name']:24}{entry['value'] or '-':12} {entry['meaning']} ({entry['read']})"
        for entry in facts["environment"]
    ]
    return lines


def _shortened(text: str, width: int = 120) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
