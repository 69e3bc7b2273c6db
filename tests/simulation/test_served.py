from __future__ import annotations

from codedinvnet.serving.rules.settings import POLICIES
from codedinvnet.simulation.served import SERVED


def test_there_is_every_policy_and_the_small_backup() -> None:
    assert list(SERVED) == [*POLICIES, "small-backup"]
    for name, policy in POLICIES.items():
        assert SERVED[name].rules == policy
        assert SERVED[name].scenario == {"policy": name, "method": "coded-invnet"}


def test_a_small_backup_is_a_code_by_its_rules() -> None:
    backup = SERVED["small-backup"]
    assert backup.backup
    assert not SERVED["coded"].backup
    assert backup.rules.coded
    assert backup.scenario == {"policy": "coded", "method": "small-backup", "r": 1}
