"""TRL, and the loss of Hugging Face's language models."""

import torch
import transformers
import trl
from exchange import work
from transformers.loss.loss_utils import ForCausalLMLoss
from trl.trainer.utils import entropy_from_logits, selective_log_softmax


def differentiated(case, loss):
    z = torch.tensor(case.logits, requires_grad=True)
    value = loss(z)
    (value * torch.tensor(case.cotangent)).sum().backward() if value.ndim else value.backward()
    return value.detach(), z.grad


def selected(case):
    return differentiated(case, lambda z: selective_log_softmax(z, torch.tensor(case.labels)))


def entropies(case):
    z = torch.tensor(case.logits, requires_grad=True)
    value = entropy_from_logits(z)
    if not value.requires_grad:
        return value, None
    (value * torch.tensor(case.cotangent)).sum().backward()
    return value.detach(), z.grad


def causal(case):
    """A batch of one sequence; the labels are the inputs, which the loss shifts."""
    labels, options = torch.tensor(case.labels)[None], {}
    if case.reduction == "sum":
        options["num_items_in_batch"] = 7
    return differentiated(case, lambda z: ForCausalLMLoss(z[None], labels, vocab_size=case.logits.shape[-1], **options))


CALLS = {"selective_log_softmax": selected, "entropy_from_logits": entropies, "transformers' ForCausalLMLoss": causal}
work(CALLS, "trl " + trl.__version__ + ", transformers " + transformers.__version__)
