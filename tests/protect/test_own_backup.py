"""A smaller model of the user's own as the backup: how it is opened, and what it is given."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.codes.backup import BackupCode
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import BACKUP, SERVED, AnswersAll
from codedinvnet.models import open_model
from codedinvnet.models.scores import ScoresOf
from codedinvnet.serving.workers.computing import BackupComputer, ModelComputer
from codedinvnet.serving.workers.result import OUTPUT, Computer
from tests.protect.conftest import PLACE
from tests.protect.factories import FEATURES, LARGE


@pytest.mark.parametrize("kind", ["of a service", "of a gateway"])
def test_a_backup_gets_the_datatypes_that_it_was_measured_on(kind: str) -> None:
    model = open_model(f"{PLACE}:precise")
    x = LARGE + np.random.default_rng(0).random((4, FEATURES))  # the same for all in float32
    x.flags.writeable = False  # as what comes from a client
    scores = ScoresOf(model).eval()
    code = BackupCode(AnswersAll(4, BACKUP))
    scheme = Scheme("own-backup", code, {SERVED: scores, BACKUP: scores}, (FEATURES,))
    computer: Computer = ModelComputer(model, scheme)
    if kind == "of a gateway":
        computer = BackupComputer(scores, model.signature.inputs)
    found = computer.compute(4, {"x": x})[0][OUTPUT].reshape(4, 3)
    np.testing.assert_allclose(found, model.run({"x": x})["output"], rtol=1e-4, atol=1e-4)
