from __future__ import annotations

import re
from pathlib import Path

import pytest

from codedinvnet.codes.named_policies import SERVED, Served, served_as
from codedinvnet.common.errors import UserError
from codedinvnet.scheduler.policies import POLICIES

MINE = f"{Path(__file__).parents[1] / 'examples' / 'my_method.py'}:TwoParities"


def test_there_is_every_policy_and_the_small_backup() -> None:
    assert list(SERVED) == [
        *(name for name in POLICIES if name != "auto"),
        "small-backup",
        "small-backup+hedge",
        "auto",
    ]
    for name, policy in POLICIES.items():
        assert SERVED[name].rules == policy
        if name == "auto":
            continue
        assert SERVED[name].scenario == {"policy": name, "method": "coded-invnet"}


def test_a_small_backup_is_a_code_by_its_rules() -> None:
    backup = SERVED["small-backup"]
    assert backup.rules.coded
    assert backup.scenario == {"policy": "coded", "method": "small-backup", "r": 1}


def test_a_method_is_hedged_as_well() -> None:
    both = SERVED["small-backup+hedge"]
    assert both.rules == POLICIES["coded"] | POLICIES["hedge"]
    assert both.rules.name == "coded+hedge"
    assert both.scenario == {"policy": "coded+hedge", "method": "small-backup", "r": 1}
    assert served_as("parm+hedge") == Served("coded+hedge", "parm")
    for wrong in ("none+hedge", "coded-invnet+hedge", "magic+hedge"):
        with pytest.raises(UserError, match=f"^'{re.escape(wrong)}' is not one of"):
            served_as(wrong)


def test_auto_has_something_at_hand() -> None:
    assert served_as("auto") == Served("auto", "small-backup")
    assert served_as("auto+coded-invnet") == Served("auto", "coded-invnet")
    assert served_as("auto+none").scenario == {"policy": "auto", "method": "none", "r": 1}
    assert served_as(f"auto+{MINE}") == Served("auto", MINE)  # other processes load it by that
    with pytest.raises(UserError, match=r"^'magic'"):
        served_as("auto+magic")
