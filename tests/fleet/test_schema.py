"""The form of the summary: what must be there, what may, and that unknown keys pass."""

from typing import Any

import msgspec
import pytest

from fleet.schema import Memory, Summary, Vm, check, ordered


def minimal() -> dict[str, Any]:
    return {
        "schema": 1,
        "run": {
            "name": "n", "spec_digest": "sha256:0", "seed": 1, "clock": "virtual", "scale": 1.0, "host_profile": "h",
            "started": "2026-01-01T00:00:00+00:00", "argv": [], "version": "0",
        },
        "outcome": "failed",
        "errors": [{"kind": "died", "message": "it did"}],
        "digest": "sha256:0",
        "elapsed": {"virtual_s": 0, "populate_virtual_s": 0, "wall_s": 0.0, "realtime_factor": 0.0},
        "vms": [
            {
                "id": 0, "policy": "none", "workload": "gups", "vcpus": 1, "outcome": "failed",
                "memory": {"total_bytes": 1, "fast_bytes": 1, "slow_bytes": 0},
            }
        ],
    }  # fmt: skip


def test_a_vm_that_left_no_figures_is_of_the_form() -> None:
    assert check(minimal()).vms[0].access is msgspec.UNSET


def test_unknown_keys_pass() -> None:
    summary = minimal()
    summary["vms"][0]["memory"]["huge_bytes"] = 0
    summary["later"] = {"more": 1}
    check(summary)


@pytest.mark.parametrize("key", ["schema", "run", "outcome", "errors", "digest", "elapsed", "vms"])
def test_a_missing_key_is_named(key: str) -> None:
    summary = minimal()
    del summary[key]
    with pytest.raises(msgspec.ValidationError, match=key):
        check(summary)


def test_a_mistyped_figure_is_named_with_its_place() -> None:
    summary = minimal()
    summary["vms"][0]["memory"]["fast_bytes"] = "12"
    with pytest.raises(msgspec.ValidationError, match=r"vms\[0\]\.memory\.fast_bytes"):
        check(summary)


def test_order_is_the_forms_and_then_the_given_one() -> None:
    given = {"zeta": 1, "outcome": "ok", "alpha": 2, "id": 0}
    assert list(ordered(given, Vm)) == ["id", "outcome", "zeta", "alpha"]
    assert list(ordered(minimal(), Summary)) == ["schema", "run", "outcome", "errors", "digest", "elapsed", "vms"]
    assert ordered({}, Memory) == {}
