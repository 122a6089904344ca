"""The code of a training step waits for no device: the lint over it, and faults that the lint finds."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

import pytest

from tests.step_lint import lint

ROOT = Path(__file__).parents[1]
FOLDERS = ("norms", "models")
STEP_CODE = [
    *sorted(p.relative_to(ROOT).as_posix() for f in FOLDERS for p in (ROOT / "bnbench" / f).glob("*.py")),
    "bnbench/data/augment.py",
    "bnbench/data/batches.py",
    "bnbench/data/randomness.py",
    "bnbench/engine/captured.py",
    "bnbench/engine/chunked.py",
    "bnbench/engine/distributed.py",
    "bnbench/engine/fleet.py",
    "bnbench/engine/stacked.py",
    "bnbench/lit.py",
    "bnbench/optimization.py",
]
# What is found and may stay: file, function, the words of the code that say what it is, and why.
ALLOWED = [
    ("norms/base.py", "add_affine", "torch.", "builds a layer, which is moved afterwards"),
    ("norms/recalibrate.py", "recalibrate", ".to(device)", "batches of a loader, after the training"),
    ("norms/reparam.py", "start", "bool(", "before the training"),
    ("models/base.py", "build_model", ".to(device)", "moves a model that was just built"),
    ("engine/chunked.py", "training_step", ".tolist()", "the losses of a block, fetched at its end"),
    ("engine/chunked.py", "do_steps", ".to(x_all.device)", "the indices of a block, at its start"),
    ("engine/fleet.py", "training_step", ".tolist()", "the losses of a block, fetched at its end"),
    ("engine/fleet.py", "do_steps", ".to(self._x.device)", "the indices of a block, at its start"),
    ("engine/fleet.py", "keep", "torch.empty(0)", "the data of a fleet that has ended"),
    ("engine/fleet.py", "_equals_separate", "torch.rand", "made-up data for a dry run on the processor"),
    ("engine/fleet.py", "members", "torch.rand", "the same"),
    ("engine/fleet.py", "_largest", "float(", "what the dry run compares"),
    ("engine/distributed.py", "check_equal", "torch.equal", "before the training"),
    ("data/batches.py", "epoch_permutation", "torch.randperm", "the same draw for every device"),
    ("data/batches.py", "step_indices", "torch.empty", "indices, which the caller sends"),
]


def allowed(file: str, finding: object) -> list[int]:
    function, _, code = str(finding).partition(": ")
    return [
        number
        for number, (place, name, words, _) in enumerate(ALLOWED)
        if file == f"bnbench/{place}" and function.split(".")[-1] == name and words in code
    ]


@pytest.mark.parametrize("file", STEP_CODE)
def test_step_code_waits_for_no_device(file):
    findings = [finding for finding in lint((ROOT / file).read_text()) if not allowed(file, finding)]
    assert not findings, "\n".join(f"{file}:{finding.line}: {finding}" for finding in findings)


def test_every_exception_is_still_one():
    used = {
        n for file in STEP_CODE for finding in lint((ROOT / file).read_text()) for n in allowed(file, finding)
    }
    assert used == set(range(len(ALLOWED)))


FAULTS = [
    "return x.mean().item()",
    "return x.tolist()",
    "return x.cpu()",
    "return x.detach().numpy()",
    "return x.to('cpu')",
    "return x.to('cpu', non_blocking=True)",
    "return values.to(x.device)",
    "return values.to(device=x.device)",
    "return torch.equal(x, values)",
    "return float(x.sum())",
    "largest = x.abs().max()\nreturn int(largest)",
    "return round(x.mean())",
    "if x.sum() > 0:\n    return x",
    "while (x > 1).any():\n    x = x / 2",
    "return x if x.isfinite().all() else -x",
    "assert not x.isnan().any()",
    "enough = x.max() > 1\nif not enough:\n    return x",
    "return x.sum() and x",
    "return max(x[0], 1.0)",
    "if self.running_mean.sum():\n    return x",
    "total = 0.0\nfor row in x:\n    if row.sum() > total:\n        total = row.sum()",
    "return x[x > 0]",
    "return x[0, x[0] != 1]",
    "mask = x > 0\nreturn x[mask & (x < 1)]",
    "x[torch.isnan(x)] = 0.0",
    "return x.nonzero()",
    "return torch.nonzero(x)",
    "return torch.where(x > 0)",
    "return torch.masked_select(x, x > 0)",
    "return x + torch.tensor(1.0)",
    "return x * torch.zeros(3)",
    "return torch.arange(len(x), dtype=x.dtype)",
    "torch.cuda.synchronize()",
    "return list(map(lambda row: row.item(), x))",
    "def inner(y):\n    return y.item()\nreturn inner(x)",
]
HONEST = [
    "return x[..., :: self.stride].flatten(1)",
    "if x.ndim == 2 or x.stride(1) == 1 or not len(x):\n    return x",
    "if x.numel() >= 10 and x.shape[0] % 2:\n    return x",
    "if self.weight is not None:\n    return x * self.weight",
    "if x.dtype in (torch.bfloat16, torch.float16):\n    return x.float()",
    "return torch.where(x > 0, x, 0.0).masked_fill(x > 1, 1.0)",
    "return x + torch.zeros(3, device=x.device) + x.new_zeros(3)",
    "return values.to(x.device, non_blocking=True)",
    "return x.to(x.dtype).to(torch.float32)",
    "return float(self.eps) * x * int(x.shape[0])",
    "inside = x > 0\nreturn x * inside",
    "return x[rows, columns]",
    "return max(len(x), 1) * max(self.sizes)",
    "if isinstance(x, torch.Tensor) and torch.is_grad_enabled():\n    return x",
]


def layer(body: str, name: str = "forward") -> str:
    method = f"def {name}(self, x: Tensor, values: object) -> Tensor:\n" + indent(body, "    ")
    return "class Layer(nn.Module):\n    running_mean: Tensor\n\n" + indent(method, "    ")


@pytest.mark.parametrize("body", FAULTS)
def test_a_fault_is_found(body):
    assert lint(layer(body))


@pytest.mark.parametrize("body", HONEST)
def test_honest_code_is_let_pass(body):
    assert not lint(layer(body))


def test_a_constructor_may_make_tensors():
    assert not lint(layer("self.average = torch.zeros(3)", name="__init__"))


def test_a_finding_says_where_it_is():
    (finding,) = lint(layer("y = x\nreturn y.item()"))
    assert (str(finding), finding.line) == ("Layer.forward: y.item()", 6)
