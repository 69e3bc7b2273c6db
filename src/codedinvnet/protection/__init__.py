"""Small backups that answer while a served model is late, and which of their answers to release."""

from codedinvnet.protection.folder import load_protection

__all__ = ["load_protection"]
