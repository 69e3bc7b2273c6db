"""Protections: what makes up for a served model's late answers, trained from unlabelled inputs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codedinvnet.protect.folder import load_protection

__all__ = ["load_protection"]


if not TYPE_CHECKING:  # or any name would pass the type checkers

    def __getattr__(name: str) -> Any:
        """Import what loads PyTorch where it is first asked for: `load` reads inputs without."""
        if name in __all__:
            from codedinvnet.protect import folder

            return getattr(folder, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
