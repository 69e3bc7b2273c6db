"""Coding methods: how missing predictions are made up for."""

from codedinvnet.methods.base import CodedMethod
from codedinvnet.methods.coded_invnet import CodedInvNet, Evidence

METHODS: dict[str, type[CodedInvNet]] = {CodedInvNet.name: CodedInvNet}
"""Every method by its name on the command line."""

__all__ = ["METHODS", "CodedInvNet", "CodedMethod", "Evidence"]
