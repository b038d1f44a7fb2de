"""What all tasks share of a target, and its batch-norm statistics, as part of the module that generates its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from fasthyper.target import Target

_Self = TypeVar("_Self", bound="HoldsTarget")


class HoldsTarget(nn.Module):
    """A module whose target's shared tensors and statistics are trained, moved, saved and loaded as its own."""

    target: Target

    def hold(self, target: Target) -> None:
        """Registers them; called once."""
        self.target, self.statistics = target, target.statistics
        for name, tensor in target.shared().items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=target.is_persistent(name))

    @property
    def rest(self) -> list[nn.Parameter]:
        """The target's parameters that are not generated; frozen ones require no gradient."""
        return [tensor for tensor in self.target.shared().values() if isinstance(tensor, nn.Parameter)]

    def train(self: _Self, mode: bool = True) -> _Self:
        self.target.module.train(mode)
        return super().train(mode)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        self._take_shared()
        super()._apply(fn, recurse)
        self._place_shared()
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self._take_shared()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._place_shared()

    def _take_shared(self) -> None:
        """Takes over buffers that the target replaced in a forward pass."""
        for name, tensor in self.target.shared().items():
            if getattr(self, name) is not tensor:
                setattr(self, name, tensor)

    def _place_shared(self) -> None:
        """Gives the target the tensors that were converted, or assigned by ``load_state_dict``."""
        for name in self.target.shared():
            self.target.place_shared(name, getattr(self, name))
