"""Declared parameters: given values win over defaults, and only declared ones come out."""

from guestd.params import Param, resolve

PARAMS = (Param("period", 4093, "events", "", "paper"), Param("decay", True, "", "", "paper"))


def test_given_values_win_over_defaults() -> None:
    assert resolve(PARAMS, {}) == {"period": 4093, "decay": True}
    assert resolve(PARAMS, {"decay": False}) == {"period": 4093, "decay": False}
    assert resolve(PARAMS, {"period": 7, "unknown": 1}) == {"period": 7, "decay": True}
