"""Next-token loss of a causal language model, in one pass over the logits.

A vocabulary's logits are the largest tensor of a step: ``[tokens, vocab]`` in float32, read and written several times
by log-softmax, cross entropy and their backward. As a client's output matrix is frozen, the gradient of the loss with
respect to the hidden states is known as soon as a chunk's logits are; each chunk is computed, used and dropped while
it is in the cache. The idea is Cut Cross-Entropy's (arXiv 2411.09009), in plain torch.

Shapes: ``h_ND`` hidden states, ``w_VD`` the output matrix, ``y_N`` the tokens to predict, N tokens in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Architectures whose logits are exactly the output matrix times the last hidden state: no soft-capping, no scaling.
PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
CHUNK_TOKENS = 256


class _FrozenHeadLoss(torch.autograd.Function):
    """Mean cross entropy of ``softmax(h wᵀ)``; its forward leaves the gradient for h behind, w has none."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, y_N: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        grad_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        count = len(y_N)
        for start in range(0, count, CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            target = y_N[rows, None]
            scores = (h_ND[rows] @ w_VD.T).float()
            scores -= scores.amax(1, keepdim=True)
            right = scores.gather(1, target)
            scores.exp_()
            normaliser = scores.sum(1, keepdim=True)
            total += (normaliser.log() - right).sum()
            if grad_ND is not None:
                # (softmax − one-hot) / N, times the output matrix
                scores /= normaliser * count
                scores.scatter_add_(1, target, torch.full_like(right, -1.0 / count))
                torch.mm(scores.to(w_VD.dtype), w_VD, out=grad_ND[rows])
        ctx.save_for_backward(grad_ND)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None


def next_token_loss(model: Any, blocks: Tensor) -> Tensor:
    """Mean loss in nats of ``blocks[:, 1:]`` given what stands before; ``blocks`` is ``[batch, length + 1]`` of ids.

    ``model`` is a causal language model of transformers whose output matrix is frozen. Other architectures than
    PLAIN_HEADS go through their own logits.
    """
    inputs, targets = blocks[:, :-1], blocks[:, 1:].flatten()
    head = model.get_output_embeddings()
    if model.config.model_type in PLAIN_HEADS and head.bias is None:
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        loss: Tensor = _FrozenHeadLoss.apply(hidden.flatten(0, 1), head.weight, targets)  # type: ignore[no-untyped-call]
        return loss
    logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)
