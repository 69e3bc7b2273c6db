"""The engines: what computes a model's networks."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from codedinvnet.common.errors import UserError

EngineName: TypeAlias = Literal["pytorch", "onnxruntime"]
PYTORCH: Final = "pytorch"
ONNX_RUNTIME: Final = "onnxruntime"


@dataclass(frozen=True)
class Engine:
    """What there is to know of an engine before it computes.

    Attributes:
        name: as options and settings have it.
        needed: modules that it needs besides PyTorch.
        extra: of this package, which installs them.
        on_cpu_only: whether it computes on processors only.
        exports: whether modules are exported to it, which takes seconds and fills the cache.
    """

    name: EngineName
    needed: tuple[str, ...] = ()
    extra: str = ""
    on_cpu_only: bool = False
    exports: bool = False

    def missing(self) -> list[str]:
        """Return which modules it needs that are not installed here."""
        return [name for name in self.needed if importlib.util.find_spec(name) is None]


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(PYTORCH),
        Engine(
            ONNX_RUNTIME,
            needed=("onnx", "onnxruntime", "onnxscript"),
            extra="onnx",
            on_cpu_only=True,
            exports=True,
        ),
    )
}


def engine_named(name: str) -> Engine:
    """Return an engine."""
    if name not in ENGINES:
        raise UserError(f"engine: {name!r} is not one of {', '.join(ENGINES)}")
    return ENGINES[name]


def check_engine(name: str, device: str) -> None:
    """Refuse an engine that there is not, or that does not compute on a device."""
    if engine_named(name).on_cpu_only and device.partition(":")[0] != "cpu":
        raise UserError(
            f"the engine {name} computes on processors only, not on {device}: give a "
            "factory, which PyTorch computes, or leave the model in its server, behind a gateway"
        )


def check_installed(name: str) -> None:
    """Refuse an engine that is not installed here."""
    engine = engine_named(name)
    if missing := engine.missing():
        told = f"pip install 'codedinvnet[{engine.extra}]'"
        raise UserError(f"the engine {name} needs {', '.join(missing)}: {told}")
