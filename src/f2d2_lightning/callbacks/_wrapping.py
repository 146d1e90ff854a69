"""A loss that rides on somebody else's training step."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils._pytree import tree_leaves


def overrides(owner: Any, name: str) -> bool:
    """Whether a LightningModule or data module, of ``lightning`` or of ``pytorch_lightning``, has its own such method.

    Lightning's ``is_overridden`` knows the classes of one of the two alone.
    """
    bases = ("LightningModule", "LightningDataModule")
    base = next((cls for cls in type(owner).__mro__ if cls.__name__ in bases), object)
    method = getattr(owner, name, None)
    return getattr(method, "__func__", method) is not getattr(base, name, None)


class _Layer:
    """What is done around a method of a module, until it is :attr:`done`.

    A copy of the module has the method as it was before: it is no part of the run.
    """

    def __init__(self, module: L.LightningModule, name: str, around: Callable[..., Any]) -> None:
        self.before, self.done = vars(module).get(name), False
        self._module, self._name, self._around = module, name, around
        self._original = getattr(module, name)
        # Lightning looks at the code behind it, and goes one step back for that
        self.__wrapped__ = inspect.unwrap(self._original)

    @property
    def __code__(self) -> types.CodeType:
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs) if self.done else self._around(self._original, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # copies and pickles make the module before its attributes, so that it is still without this one
        return (getattr, (self._module, self._name)) if self.before is None else (_itself, (self.before,))


def _itself(value: Any) -> Any:
    return value


class Wrapped:
    """Methods of a module that something is done around, until :meth:`restore` gives it its own back.

    Several may be around one method, and end in any order.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self._layers: dict[str, _Layer] = {}

    def wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Call ``around(original, *args, **kwargs)`` in place of a method."""
        self._layers[name] = _Layer(self.module, name, around)
        setattr(self.module, name, self._layers[name])

    def restore(self) -> None:
        own = vars(self.module)
        for name, layer in self._layers.items():
            layer.done = True
            # what somebody else has wrapped in the meantime stays below; of ours, those below end with the last
            while isinstance(top := own.get(name), _Layer) and top.done:
                if top.before is None:
                    delattr(self.module, name)
                else:
                    setattr(self.module, name, top.before)
        self._layers = {}


class AddedLoss:
    """Adds a loss of ``(batch, batch_idx)`` to what ``training_step`` returns, or to one of its backward passes.

    That is the ``manual_backward`` number ``backward`` of a step, from 0, or the first that reaches the network, which
    ``carries`` tells. ``about`` is the network's name. A step that fetches its batches by itself is a ``ValueError``.
    """

    def __init__(
        self,
        module: L.LightningModule,
        loss: Callable[[Any, int], Tensor],
        backward: int | None,
        carries: Callable[[], bool],
        about: str,
    ) -> None:
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ValueError(
                f"{type(module).__name__}.training_step takes dataloader_iter, so its batches are not seen; write "
                "training_step(batch, batch_idx), or compute the loss by hand (f2d2_lightning.JointFlowMap)"
            )
        self.module, self.loss, self.index, self.carries, self.about = module, loss, backward, carries, about
        self._forget()

    def _forget(self) -> None:
        self._due: tuple[Any, int] | None = None
        self._backwards = 0
        self.stepped = False
        """Whether an optimiser of the network stepped in this batch, in manual optimisation."""

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``training_step``."""
        batch = args[0] if args else kwargs["batch"]
        index = self.module.trainer.fit_loop.epoch_loop.batch_idx  # a step need not ask for it
        self._forget()
        before = _versions(batch)
        output = self._step(original, batch, index, *args, **kwargs)
        if _versions(batch) != before:
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step writes into its batch, and the added loss and the fit of "
                "the head take it as the loader gave it; write batch = 2 * batch, say, for batch *= 2, or do it in "
                "on_after_batch_transfer"
            )
        return output

    def _step(self, original: Callable[..., Any], batch: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        if self.module.automatic_optimization:
            output = original(*args, **kwargs)
            if output is None:  # the module leaves this batch out
                return None
            own = output["loss"] if isinstance(output, Mapping) else output
            total = own + self.loss(batch, index).to(own)
            return {**output, "loss": total} if isinstance(output, Mapping) else total
        self._due = batch, index
        output = original(*args, **kwargs)
        if self._due is not None and self.stepped:  # else the batch is another network's, such as a critic's
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step called manual_backward {self._backwards} times and "
                f"stepped {self.about!r}, and the added loss could go with none of them (backward={self.index}); "
                "use self.manual_backward(loss) instead of loss.backward(), while a parameter of the network requires "
                "gradients, leave out backward=, or give frozen=True if the network is not to be trained"
            )
        return output

    def backward(self, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Around ``manual_backward``."""
        index, self._backwards = self._backwards, self._backwards + 1
        if self._due is not None and (self.carries() if self.index is None else index == self.index):
            (batch, batch_index), self._due = self._due, None
            loss = loss + self.loss(batch, batch_index).to(loss)
        original(loss, *args, **kwargs)


def _versions(batch: Any) -> list[int]:
    """Of the tensors of a batch: they change where somebody writes into one."""
    return [part._version for part in tree_leaves(batch) if isinstance(part, Tensor) and not part.is_inference()]
