"""All policies by name; a third party's comes in by an entry point."""

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

import pytest

from guestd.tiering import registry
from guestd.tiering.policy import PluginError, Policy

BUILT_IN = {
    "none", "all-fast", "all-slow", "oracle", "g-tpp", "tpp-mainline", "h-tpp", "memtis", "hemem", "nomad",
    "hyperplace", "heterovisor", "heteroos", "raminate", "vtmm", "memstrata",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    registry.policies.cache_clear()
    yield
    registry.policies.cache_clear()


def test_the_built_in_ones_are_there_under_their_own_names() -> None:
    found = registry.policies()
    assert set(found) >= BUILT_IN
    assert all(name == policy.name for name, policy in found.items())
    assert {found[name].view for name in ("none", "all-fast", "all-slow", "oracle")} == {"-"}


STRANGER = Policy("stranger", "from elsewhere", "guest", "a test")
USURPER = Policy("none", "takes a name that is taken", "guest", "a test")
NO_POLICY = {"name": "stranger"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Another package's entry point, as if it were installed."""

    def install(value: str) -> None:
        point = EntryPoint("plugged", value, "tierfleet.policies")
        monkeypatch.setattr(registry, "entry_points", lambda *, group: [point] if group == point.group else [])

    return install


def test_another_packages_entry_point_adds_one(installed: Callable[[str], None]) -> None:
    installed(f"{__name__}:STRANGER")
    found = registry.policies()
    assert set(found) == BUILT_IN | {"stranger"}
    assert found["stranger"] is STRANGER


@pytest.mark.parametrize(
    ("value", "says"),
    [("USURPER", "give it another name"), ("NO_POLICY", "is no guestd"), ("MISSING", "uninstall it")],
)
def test_one_that_cannot_be_taken_is_refused_by_name(value: str, says: str, installed: Callable[[str], None]) -> None:
    installed(f"{__name__}:{value}")
    with pytest.raises(PluginError, match=says) as refusal:
        registry.policies()
    assert "'plugged'" in str(refusal.value)
