"""The replay model of the papers: a fully connected variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.nets.mlp import MLP


class VAE(nn.Module):
    """Encodes images as a normal distribution of latents, and decodes latents beside a condition (Kingma and Welling, 2014).

    Args:
        num_inputs: F, pixels of an image; images are flattened.
        encoder_hidden, decoder_hidden: widths of the hidden layers.
        latent: L, latents.
        conditions: C, size of the condition, which only the decoder sees.
    """

    def __init__(
        self,
        num_inputs: int,
        encoder_hidden: Sequence[int],
        decoder_hidden: Sequence[int],
        *,
        latent: int = 100,
        conditions: int = 100,
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "num_inputs": num_inputs,
            "encoder_hidden": list(encoder_hidden),
            "decoder_hidden": list(decoder_hidden),
            "latent": latent,
            "conditions": conditions,
        }
        self.latent, self.conditions = latent, conditions
        self.encoder = MLP(num_inputs, encoder_hidden, 2 * latent)
        self.decoder = MLP(latent + conditions, decoder_hidden, num_inputs)

    def forward(self, noise: Tensor, condition: Tensor, x: Tensor | None = None) -> Any:
        """Logits ``[B, F]`` of images that standard normal ``noise`` ``[B, L]`` and ``condition`` ``[C]`` stand for.

        With images ``x`` ``[B, ...]`` those of ``z = mean + exp(log_variance / 2) * noise``, and after them ``mean`` and
        ``log_variance``, ``[B, L]``.
        """
        z, found = noise, ()
        if x is not None:
            found = mean, log_variance = self.encoder(x).chunk(2, 1)
            z = torch.addcmul(mean, log_variance.mul(0.5).exp(), noise)
        logits = self.decoder(torch.cat([z, condition.expand(len(z), -1)], 1))
        return logits if x is None else (logits, *found)
