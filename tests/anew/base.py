"""What the models written anew share: weights of an original under names of their own, one mistake at one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


class Anew(nn.Module):
    """A model on the weights of an original. `wrong` names the one mistake that it makes, in layer `at`."""

    #: Every mistake that it can make.
    MISTAKES: tuple[str, ...] = ()

    def __init__(self, original: nn.Module, wrong: str = "", at: int = 1) -> None:
        super().__init__()
        assert not wrong or wrong in self.MISTAKES, wrong
        self.wrong, self.at, self.config = wrong, at, original.config
        self.given = {k: v.detach().clone() for k, v in original.state_dict().items()}
        self.prepare(self.given)
        del self.given

    def prepare(self, given: dict[str, Tensor]) -> None:
        """Take over the weights; a name of the original ends in ``.weight`` or ``.bias``."""
        raise NotImplementedError

    def keep(self, **tensors: Tensor) -> None:
        """Keep weights as buffers."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())

    def stacked(self, pattern: str, change: Callable[[Tensor], Tensor] = lambda w: w) -> Tensor:
        """Stack one weight of all layers, [layers, ...]; ``*`` in the pattern is the layer."""
        count = getattr(self.config, "num_hidden_layers", None) or self.config.encoder_layers
        return torch.stack([change(self.given[pattern.replace("*", str(i))]) for i in range(count)])

    def is_wrong(self, what: str, layer: int | None = None) -> bool:
        """Whether this is the place of that mistake."""
        return self.wrong == what and (layer is None or layer == self.at)


def shuffled(model: nn.Module, seed: int) -> nn.Module:
    """Give every weight random numbers of a size that lets signals through: no ones, no zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            elif not name.endswith("A_log"):
                fan = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                parameter.copy_(noise * fan**-0.5 * 1.5)
    return model.eval()


def config(kind: str, **sizes: Any) -> Any:
    import transformers

    made = getattr(transformers, f"{kind}Config")(**sizes)
    made._attn_implementation = sizes.get("attention", "sdpa")
    return made
