"""Ways to change a block's parameters and buffers that torch counts, for tests of what is kept of them."""

import torch
from torch import nn


def tensors(block):
    """Every parameter and buffer that evaluation depends on, by name."""
    return {n: t for n, t in block.state_dict(keep_vars=True).items() if "num_batches" not in n}


def owner_of(block, name):
    path, _, last = name.rpartition(".")
    return block.get_submodule(path), last


def in_place(block, name, t):
    with torch.no_grad():
        t.mul_(0.5)


def by_a_view(block, name, t):
    with torch.no_grad():
        t.view(-1)[:1].add_(1)


def by_a_detached_alias(block, name, t):
    t.detach().add_(0.25)


def by_foreach(block, name, t):
    with torch.no_grad():
        torch._foreach_mul_([t], 0.5)


def in_inference_mode(block, name, t):
    with torch.inference_mode():
        t.mul_(0.5)


def as_an_output(block, name, t):
    with torch.no_grad():
        torch.mul(t.detach().clone(), 0.5, out=t)


def by_loading(block, name, t):
    state = {n: v.clone() for n, v in block.state_dict().items()}
    state[name] *= 0.5
    block.load_state_dict(state)


def by_assigning(block, name, t):
    state = {n: v.clone() for n, v in block.state_dict().items()}
    state[name] *= 0.5
    block.load_state_dict(state, assign=True)


def by_a_new_tensor(block, name, t):
    module, last = owner_of(block, name)
    new = (t.detach() * 0.5).clone()
    setattr(module, last, nn.Parameter(new) if isinstance(t, nn.Parameter) else new)


def by_a_new_tensor_on_the_same_memory(block, name, t):
    module, last = owner_of(block, name)
    alias = t.data
    alias.mul_(0.5)
    kept = nn.Parameter(alias) if isinstance(t, nn.Parameter) else alias
    while kept._version < t._version:
        torch.autograd.graph.increment_version(kept)
    setattr(module, last, kept)


def by_new_data(block, name, t):
    t.data = t.data * 0.5


def by_set(block, name, t):
    with torch.no_grad():
        t.set_(t.detach() * 0.5)


def by_swapping(block, name, t):
    other = (t.detach() * 0.5).clone()
    torch.utils.swap_tensors(t, nn.Parameter(other) if isinstance(t, nn.Parameter) else other)


CHANGES = (
    in_place,
    by_a_view,
    by_a_detached_alias,
    by_foreach,
    in_inference_mode,
    as_an_output,
    by_loading,
    by_assigning,
    by_a_new_tensor,
    by_a_new_tensor_on_the_same_memory,
    by_new_data,
    by_set,
    by_swapping,
)
