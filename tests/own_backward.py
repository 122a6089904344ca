"""What is asked of norms with a backward pass of their own: replicas and compiled steps are the same."""

import copy

import torch
from torch.func import functional_call, stack_module_state


def train_once(call, layer, x, g):
    """Output and gradients of one training step, of the input first."""
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], g)]


def check_replicas(layers, batch_of, steps):
    """Under vmap the layers, built alike, train as alone; `batch_of(seed)` gives float64 batches."""
    parameters, buffers = stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def forward(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), x)

    places = range(len(layers))
    for step in range(steps):
        x, g = (torch.stack([batch_of(7 * step + k + 50 * n) for k in places]) for n in (0, 1))
        leaf = x.clone().requires_grad_()
        y = torch.vmap(forward)(parameters, buffers, leaf)
        together = [y, *torch.autograd.grad(y, [leaf, *parameters.values()], g)]
        for k, layer in enumerate(layers):
            for got, wanted in zip(together, train_once(layer, layer, x[k], g[k]), strict=True):
                torch.testing.assert_close(got[k], wanted, rtol=1e-10, atol=1e-12)
            for name, buffer in layer.named_buffers():
                torch.testing.assert_close(buffers[name][k], buffer)


def check_compiled_steps(layer, twin, batch_of):
    """A compiled backward pass must not read statistics that its forward pass has moved."""
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(5):
        x, g = batch_of(step), batch_of(10 + step)
        plain, other = (
            [*train_once(call, own, x, g), *own.buffers()] for call, own in ((layer, layer), (compiled, twin))
        )
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-9)
