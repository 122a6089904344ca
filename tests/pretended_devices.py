"""Devices that this machine lacks: tensors without values on them, and a watch on what would wait or fail."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnbench.data import Arrays
from bnbench.engine.chunked import ChunkedClassifier, FusedSGD
from bnbench.engine.fleet import FleetClassifier

COPIES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class DeviceFault(Exception):
    """What would wait for the device, or fail on it."""


def tensors_in(*values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Refuses, for one kind of device, what torch lets pass without values, or without the device.

    Operands on the host beside ones on the device, scalar tensors and indices among them; copies to the
    host, and copies from it that block; masks as indices, since only the device knows how many values they
    take; collectives on tensors that are elsewhere (gloo takes those of the host, which NCCL refuses). All
    functions of torch.distributed end here, so none has to be listed; `collectives` has those that ran.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.collectives: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        places = {tensor.device for tensor in tensors_in(args, kwargs)}
        if func.namespace in COLLECTIVES:
            self.collectives.append(name)
            if any(place.type != self.kind for place in places):
                raise DeviceFault(f"{name} of tensors on {show(places)}, not {self.kind}")
        elif name in COPIES:
            self._check_copy(name, args, kwargs)
        elif {place.type == self.kind for place in places} == {True, False}:
            raise DeviceFault(f"{name} of tensors on {show(places)}")
        if name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])):
            raise DeviceFault(f"{name} by a mask: the host waits for the number of values")
        if name == "aten::_fused_sgd_":
            return None  # without a kernel for tensors that have no values, and with nothing to return
        return func(*args, **kwargs)

    def _check_copy(self, name, args, kwargs) -> None:
        target, source = args[:2] if name == "aten::copy_" else (kwargs.get("device"), args[0])
        if not isinstance(source, torch.Tensor):
            return  # a number from the host goes with the kernel's arguments
        place = target.device if isinstance(target, torch.Tensor) else torch.device(target or source.device)
        if source.device.type == place.type:
            return
        if source.device.type == self.kind:
            raise DeviceFault(f"{name} from {self.kind} to {place}: the host waits for the values")
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if place.type == self.kind and waits:
            raise DeviceFault(f"{name} to {self.kind} blocks: the host waits for all earlier work")


def show(places: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, places)))


@contextmanager
def guard_for_cuda() -> Iterator[None]:
    """Let torch switch to CUDA devices that are not there.

    Built for CUDA, torch does the same by itself in FakeTensorMode: it registers a device guard that does
    nothing. Built without, it has no guard at all, and here it borrows that of the meta device.
    """
    library = next((Path(torch.__file__).parent / "lib").glob("*c10.*"))
    table = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(str(library)), table)
    cuda, meta = (int(getattr(torch._C._autograd.DeviceType, name)) for name in ("CUDA", "Meta"))
    before = guards[cuda]
    guards[cuda] = before or guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


class Pretended:
    """Modules and tensors without values, on "meta" or on a "cuda" that need not exist."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fake = FakeTensorMode(allow_non_fake_inputs=False) if kind == "cuda" else None

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """Give a tensor of the same sizes and strides on the device."""
        if self.fake is None:
            return real.detach().to(self.kind)
        fake = self.fake.from_tensor(real.detach(), static_shapes=True)
        with self.fake:
            return fake.to(torch.device(self.kind, 0))

    def module(self, module: nn.Module) -> nn.Module:
        """Move parameters and buffers as `module.to` does, which refuses fake tensors.

        What a module holds beside them stays where it is, and fails on its first use.
        """
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(self.tensor(value), value.requires_grad)
            part._buffers.update({n: b if b is None else self.tensor(b) for n, b in part._buffers.items()})
        return module

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Run what follows under a watch; on "cuda" without gradients, which need the real back end."""
        gradients = torch.set_grad_enabled(self.fake is None)
        with gradients, torch.random.fork_rng([]), self.fake or nullcontext(), Watch(self.kind) as watch:
            yield watch


def gradients_without_values(loss, inputs, **options):
    """Stand in for torch.autograd.grad where gradients have no back end."""
    return tuple(torch.empty_like(value) for value in inputs)


def small_classifier(device: Pretended, **changes: object) -> ChunkedClassifier:
    """A small network to train; `changes` are the module's arguments. Its data are not on the device yet."""
    arguments = {"model": "cnn", "model_options": {"channels": 8}, "norm": "batch"} | changes
    module = ChunkedClassifier(
        **arguments,
        train=Arrays(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)),
        batch_size=4,
        training_seed=(0,),
        in_shape=(3, 8, 8),
        num_classes=4,
        steps=4,
    )
    return device.module(module).train()


def take_fleet_steps(device: Pretended, **changes: object) -> list[torch.Tensor]:
    """Do two steps of a fleet of three under a watch; returns the losses of each step."""
    members = [small_classifier(device, **changes) for _ in range(3)]
    for member in members:
        member.train_arrays = Arrays(*map(device.tensor, (member.train_arrays.x, member.train_arrays.y)))
        if member.reference is not None:
            member.reference = device.tensor(member.reference)
        member.optimizer_state = FusedSGD(member.decay_groups(), momentum=0.9)
    index = device.tensor(torch.arange(12).view(3, 4) % 8)
    with device.watched():
        fleet = FleetClassifier(members)
        return [fleet._step(step, index) for step in range(2)]


def take_steps(device: Pretended, **changes: object) -> ChunkedClassifier:
    """Do two training steps of a small network under a watch; `changes` are the module's arguments."""
    module = small_classifier(device, **changes)
    data = module.train_arrays
    x, y, index = (device.tensor(values) for values in (data.x, data.y, torch.arange(4)))
    grad = torch.autograd.grad if device.fake is None else gradients_without_values
    with mock.patch.object(torch.autograd, "grad", grad), device.watched() as watch:
        module.prepare()
        for step in range(2):
            loss = module._step(step, x.index_select(0, index), y.index_select(0, index))
            assert (loss.device.type, loss.shape, loss.requires_grad) == (device.kind, (), False)
    module.collectives = watch.collectives
    return module
