#!/usr/bin/env bash
# Which gradient does PyTorch's linear_cross_entropy give for a batch of padding only, with options and without?
#
# Guess: 0 in both cases, as in cross_entropy. Seen with torch 2.13.0 on a CPU: in both cases the value is NaN, a mean over
# nothing; the gradient is 0 without options, and NaN with LinearCrossEntropyOptions, so that a step makes the weights NaN.
# Fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy


def value_and_gradient(options):
    torch.manual_seed(0)
    features, weight = torch.randn(12, 4), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(features, weight, torch.full((12,), -100), options=options)
    loss.backward()
    return loss.detach(), weight.grad


(plain, none), (chunked, nan) = map(value_and_gradient, (None, LinearCrossEntropyOptions(batch_chunk_size=5)))
print("values", plain.item(), chunked.item(), "largest gradients", none.abs().max().item(), nan.abs().max().item())
assert plain.isnan() and chunked.isnan()
assert not none.any() and nan.isnan().all()
PYTHON
echo "as seen"
