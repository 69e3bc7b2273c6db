from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from codedinvnet.common.devices import first_tensor


def test_whole_numbers_do_not_tell_a_modules_type() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    norm.num_batches_tracked, norm.running_mean = torch.tensor(0), torch.zeros(3).double()
    assert first_tensor(nn.Sequential(norm)).dtype == torch.float64
    assert first_tensor(nn.Sequential(norm, nn.Linear(2, 2))).dtype == torch.float32


def test_threads_started_later_flush_denormal_numbers_too() -> None:
    """Commands do it early, since threads that run already are not reached."""
    code = """
import torch
from codedinvnet.common.devices import flush_denormals

torch.set_num_threads(2)
flush_denormals()
small = torch.full((1 << 20,), 1e-30)  # it starts PyTorch's threads
print(int(small.mul(1e-10).count_nonzero()))
"""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush denormal numbers")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0
