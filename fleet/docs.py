"""Writes docs/policies.md and docs/parameters.md from the code's own declarations: ``python -m fleet.docs``.

A test compares the files with `pages`, so that they never say anything else than the code. Only the built-in policies
are in it; `fleet policies` lists those of other packages too.
"""

from collections.abc import Sequence
from pathlib import Path

from fleet.spec_params import ENGINE_PARAMS, GUEST_PARAMS, HOST_PARAMS
from guestd.params import Param, resolve
from guestd.tiering.policy import Policy
from guestd.tiering.registry import BUILT_IN
from proto.units import PAGE_SIZE, format_bytes, format_time

FOLDER = Path(__file__).resolve().parent.parent / "docs"

_VIEWS = {
    "guest": "guest: gVA to gPA, through the guest page table",
    "host": "host: gPA to hPA, through the EPT",
    "-": "none: it manages nothing",
}
_GAIN_SIZES = (256 << 20, 16 << 30)
"""Sizes of memory for which a page says how soon its policy gains, bytes."""
_HEAD = """\
# Policies

Written by `python -m fleet.docs` from the declarations in `guestd/tiering/`; a test keeps it up to date. On the command
line: `fleet policies`, and `fleet policies NAME` for one with all that can be set. Set a parameter with
`--set policy.NAME=VALUE`, or with `set.policy.NAME` in a spec. What is counted and charged for each operation is in
[model.md](model.md).
"""

_PARAMETERS_HEAD = """\
# Parameters of engine, guest and host

Written by `python -m fleet.docs` from the declarations in `fleet/spec_params.py`; a test keeps it up to date. Set one
with `--set SPACE.NAME=VALUE`, or with `set.SPACE.NAME` in a spec. Those of policies are in [policies.md](policies.md),
those of workloads in `fleet workloads NAME`; every cost of the host profile (`fleet hosts show NAME`) is set in the
space `host` too.
"""
_SPACES = (
    ("guest", "the guests' kernel; each group of VMs may have its own", GUEST_PARAMS),
    ("host", "the host's kernel and hypervisor, beside its costs", HOST_PARAMS),
    ("engine", "the emulator, by which no result moves by more than 2 %", ENGINE_PARAMS),
)


def pages() -> dict[str, str]:
    """File name in docs/ -> what it must say."""
    return {"policies.md": policies_page(), "parameters.md": parameters_page()}


def parameters_page() -> str:
    """The page as Markdown: a table for each space."""
    sections = [f"\n## {space}\n\nParameters of {what}.\n\n{_param_table(params)}" for space, what, params in _SPACES]
    return _PARAMETERS_HEAD + "".join(sections)


def policies_page(policies: Sequence[Policy] = BUILT_IN) -> str:
    """The page as Markdown: a table of all, then a section for each."""
    rows = [[f"[{one.name}](#{one.name})", one.view, one.summary, one.source] for one in policies]
    return "\n".join([_HEAD, _table(("policy", "view", "what it does", "source"), rows), *map(_section, policies)])


def _section(policy: Policy) -> str:
    share = [] if policy.fast_share is None else [f"- fast share of memory: {policy.fast_share}, whatever the run says"]
    stages = [f"- {kind}: `{stage.name}`, {stage.summary} ({stage.source})" for kind, stage in policy.parts.items()]
    unpublished = [f"`{param.name}`" for param in policy.params if param.source.startswith("unpublished")]
    parts = [
        f"\n## {policy.name}\n",
        f"{policy.summary}. Source: {policy.source}.\n",
        f"- view: {_VIEWS[policy.view]}",
        *share,
        *(stages or (f"- {stage}: {what}" for stage, what in policy.stages.items() if what != "-")),
        *([f"- never published, so chosen here: {', '.join(unpublished)}"] if unpublished else []),
        *([f"- left out: {policy.left_out}"] if policy.left_out else []),
        *([f"- need not beat random placement: {policy.no_gain}"] if policy.no_gain else _gains(policy)),
        "",
    ]
    if not policy.params:
        return "\n".join([*parts, "No parameters.\n"])
    return "\n".join([*parts, _param_table(policy.params)])


def _gains(policy: Policy) -> list[str]:
    params = resolve(policy.params, {})
    times = [policy.gains_ps(params, size // PAGE_SIZE) for size in _GAIN_SIZES]
    at = " and ".join(
        f"{format_time(time)} at {format_bytes(size)}" for size, time in zip(_GAIN_SIZES, times, strict=True)
    )
    return [f"- beats random placement of a static hot set within, of virtual time: {at}"] if any(times) else []


def _param_table(params: Sequence[Param]) -> str:
    rows = [[f"`{p.name}`", f"`{_text(p.default)}`", p.unit, _limits(p), p.help, p.source] for p in params]
    return _table(("parameter", "default", "unit", "allowed", "meaning", "source"), rows)


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
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
