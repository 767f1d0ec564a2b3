"""Which parameters a backward pass has reached: ZeRO-3 applies an old gradient again where a new one is missing."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor
from torch.nn import Parameter


class GradientWatch:
    """Notes through hooks which trainable parameters have received a gradient on this rank since `clear`."""

    def __init__(self, parameters: Mapping[str, Parameter]):
        self._expected = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self._names_with_gradient: set[str] = set()
        for name in self._expected:
            remember = partial(self._remember, name)
            parameters[name].register_post_accumulate_grad_hook(remember)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self._names_with_gradient.clear()

    def missing(self) -> list[str]:
        """Trainable parameters without a gradient, sorted."""
        return sorted(self._expected - self._names_with_gradient)

    def _remember(self, name: str, _parameter: Tensor) -> None:
        self._names_with_gradient.add(name)
