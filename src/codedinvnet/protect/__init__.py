"""Protections: what makes up for a served model's late answers, trained from unlabelled inputs."""

from codedinvnet.protect.folder import load_protection

__all__ = ["load_protection"]
