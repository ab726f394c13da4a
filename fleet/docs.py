"""Writes docs/policies.md from the policies' own declarations: ``python -m fleet.docs``.

A test compares the file with `policies_page`, so that it never says anything else than the code. Only the built-in
policies are in it; `fleet policies` lists those of other packages too.
"""

from collections.abc import Sequence
from pathlib import Path

from guestd.params import Param
from guestd.tiering.policy import Policy
from guestd.tiering.registry import BUILT_IN

POLICIES_PAGE = Path(__file__).resolve().parent.parent / "docs" / "policies.md"

_VIEWS = {
    "guest": "guest: gVA to gPA, through the guest page table",
    "host": "host: gPA to hPA, through the EPT",
    "-": "none: it manages nothing",
}
_HEAD = """\
# Policies

Written by `python -m fleet.docs` from the declarations in `guestd/tiering/`; a test keeps it up to date. On the command
line: `fleet policies`, and `fleet policies NAME` for one with all that can be set. Set a parameter with
`--set policy.NAME=VALUE`, or with `set.policy.NAME` in a spec. What is counted and charged for each operation is in
[model.md](model.md).
"""


def policies_page(policies: Sequence[Policy] = BUILT_IN) -> str:
    """The page as Markdown: a table of all, then a section for each."""
    rows = [[f"[{one.name}](#{one.name})", one.view, one.summary, one.source] for one in policies]
    return "\n".join([_HEAD, _table(("policy", "view", "what it does", "source"), rows), *map(_section, policies)])


def _section(policy: Policy) -> str:
    parts = [
        f"\n## {policy.name}\n",
        f"{policy.summary}. Source: {policy.source}.\n",
        f"- view: {_VIEWS[policy.view]}",
        *(f"- {stage}: {what}" for stage, what in policy.stages.items() if what != "-"),
        "",
    ]
    if not policy.params:
        return "\n".join([*parts, "No parameters.\n"])
    rows = [[f"`{p.name}`", f"`{_text(p.default)}`", p.unit, _limits(p), p.help, p.source] for p in policy.params]
    return "\n".join([*parts, _table(("parameter", "default", "unit", "allowed", "meaning", "source"), rows)])


def _limits(param: Param) -> str:
    if param.choices:
        return ", ".join(f"`{choice}`" for choice in param.choices)
    if isinstance(param.default, bool):
        return "`true`, `false`"
    low = "" if param.minimum is None else f"{param.minimum:g}"
    high = "" if param.maximum is None else f"{param.maximum:g}"
    return f"{low} to {high}".strip() if low or high else ""


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    POLICIES_PAGE.write_text(policies_page(), encoding="utf-8")
