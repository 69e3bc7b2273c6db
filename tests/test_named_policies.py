from __future__ import annotations

import re
from pathlib import Path

import pytest

from codedinvnet.codes.named_policies import SERVED, Served, served_as
from codedinvnet.common.errors import UserError
from codedinvnet.scheduler.policies import POLICIES

MINE = f"{Path(__file__).parents[1] / 'examples' / 'my_method.py'}:TwoParities"


def test_every_policy_is_served_by_its_name() -> None:
    assert set(SERVED) == {*POLICIES, "small-backup", "small-backup+hedge"}
    for name, policy in POLICIES.items():
        assert SERVED[name].rules == policy
        if name != "auto":
            assert SERVED[name].scenario == {"policy": name, "method": "coded-invnet"}


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("small-backup", Served("coded", "small-backup")),
        ("small-backup+hedge", Served("coded+hedge", "small-backup")),
        ("parm+hedge", Served("coded+hedge", "parm")),
        ("auto", Served("auto", "small-backup")),
        ("auto+coded-invnet", Served("auto", "coded-invnet")),
        ("auto+none", Served("auto", "none")),
        (f"auto+{MINE}", Served("auto", MINE)),  # other processes load it by that
        *((wrong, None) for wrong in ("none+hedge", "coded-invnet+hedge", "magic+hedge")),
        ("auto+magic", None),
    ],
)
def test_a_method_goes_with_a_policy(name: str, served: Served | None) -> None:
    if served is None:
        with pytest.raises(UserError, match=f"^'{re.escape(name.removeprefix('auto+'))}'"):
            served_as(name)
        return
    assert served_as(name) == served
    r = {} if served.method == "coded-invnet" else {"r": 2 if served.method == MINE else 1}
    assert served.scenario == {"policy": served.policy, "method": served.method, **r}
    assert served.rules.coded or served.policy == "auto"
    assert served.rules.name == served.policy
