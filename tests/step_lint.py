"""A lint of code that runs in every training step: what makes the host wait for the device, or leaves it."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

FETCHES = {
    *("item", "tolist", "cpu", "numpy", "equal", "allclose"),
    *("nonzero", "masked_select", "argwhere", "unique", "bincount"),
}
FACTORIES = {
    *("tensor", "as_tensor", "scalar_tensor", "from_numpy", "zeros", "ones", "full", "empty", "eye"),
    *("arange", "linspace", "rand", "randn", "randint", "randperm", "normal"),
}
# What a tensor tells without its values.
KNOWN_ATTRIBUTES = {
    "shape",
    "ndim",
    "dtype",
    "device",
    "requires_grad",
    "is_cuda",
    "is_meta",
    "layout",
    "names",
}
KNOWN_METHODS = {"size", "numel", "stride", "dim", "is_contiguous", "element_size", "get_device", "data_ptr"}
KNOWN_FUNCTIONS = {"len", "isinstance", "type", "id", "is_tensor", "is_grad_enabled", "get_default_dtype"}
IDENTITY = (ast.Is, ast.IsNot, ast.In, ast.NotIn)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Finding:
    """A fault, with the function that holds it; as text, "Class.method: code"."""

    function: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.function}: {self.code}"


def lint(source: str) -> list[Finding]:
    """Find the faults in a file's functions, but for constructors, whose work `module.to` moves."""
    found = [Scope(*function).findings() for function in functions(ast.parse(source))]
    return sorted(itertools.chain(*found), key=lambda finding: finding.line)


def functions(
    tree: ast.AST, prefix: str = "", members: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Function, frozenset[str]]]:
    """Yield every function but constructors, its dotted name, and its class's attributes that are tensors."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            typed = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            tensors = {ast.unparse(part.target) for part in typed if is_tensor_type(part.annotation)}
            yield from functions(node, f"{prefix}{node.name}.", frozenset(tensors))
        elif isinstance(node, Function):
            if node.name != "__init__":
                yield f"{prefix}{node.name}", node, members
            yield from functions(node, f"{prefix}{node.name}.", members)
        else:
            yield from functions(node, prefix, members)


def is_tensor_type(annotation: ast.expr | None) -> bool:
    words = ast.unparse(annotation).replace("torch.", "").split(" | ") if annotation else []
    return "Tensor" in words


@dataclass
class Scope:
    """One function: which of its names are tensors and which are masks, as far as its code tells."""

    name: str
    node: Function
    members: frozenset[str]
    tensors: set[str] = field(default_factory=set)
    masks: set[str] = field(default_factory=set)

    def findings(self) -> list[Finding]:
        arguments = self.node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        self.tensors |= {argument.arg for argument in every if is_tensor_type(argument.annotation)}
        while self._learn():
            pass
        return [
            Finding(self.name, node.lineno, ast.unparse(node)) for node in self._own() if self._is_fault(node)
        ]

    def _own(self) -> Iterator[ast.AST]:
        """Yield the nodes of this function, without those of functions inside it; lambdas are its own."""
        waiting: list[ast.AST] = [*self.node.body]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += [n for n in ast.iter_child_nodes(node) if not isinstance(n, Function | ast.ClassDef)]

    def _learn(self) -> bool:
        before = len(self.tensors), len(self.masks)
        for node in self._own():
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
                targets, value = [node.target], node.value
                if isinstance(node, ast.AnnAssign) and is_tensor_type(node.annotation):
                    self.tensors.add(ast.unparse(node.target))
            elif isinstance(node, ast.For | ast.comprehension):
                targets, value = [node.target], node.iter
            else:
                continue
            nodes = itertools.chain(*map(ast.walk, targets))
            names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if self.is_tensor(value):
                self.tensors |= names
            if self.is_mask(value):
                self.masks |= names
        return before != (len(self.tensors), len(self.masks))

    def is_tensor(self, node: ast.AST) -> bool:
        """Whether an expression is a tensor for certain; False where the code does not tell."""
        match node:
            case ast.Name(id=name):
                return name in self.tensors
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in self.members:
                return True
            case ast.Attribute(value=value, attr=name):
                return name not in KNOWN_ATTRIBUTES and self.is_tensor(value)
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if self.is_tensor(value):
                return name not in KNOWN_METHODS | {"item", "tolist", "numpy"}
            case ast.Call(func=function, args=arguments):
                named = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
                ours = ast.unparse(function).startswith(("torch.", "F.", "nn.functional."))
                return ours and named not in KNOWN_FUNCTIONS and any(map(self.is_tensor, arguments))
            case ast.Compare(left=left, ops=operators, comparators=others):
                by_value = not any(isinstance(operator, IDENTITY) for operator in operators)
                return by_value and any(map(self.is_tensor, [left, *others]))
            case ast.BinOp(left=left, right=right):
                return self.is_tensor(left) or self.is_tensor(right)
            case ast.UnaryOp(op=operator, operand=operand):
                return not isinstance(operator, ast.Not) and self.is_tensor(operand)
            case ast.Subscript(value=value) | ast.Starred(value=value):
                return self.is_tensor(value)
            case ast.IfExp(body=body, orelse=other):
                return self.is_tensor(body) or self.is_tensor(other)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return any(map(self.is_tensor, parts))
        return False

    def is_mask(self, node: ast.AST) -> bool:
        """Whether an expression is a comparison of tensors, by itself or through names and operators."""
        match node:
            case ast.Name(id=name):
                return name in self.masks
            case ast.Compare():
                return self.is_tensor(node)
            case ast.BinOp(left=left, right=right):
                return self.is_mask(left) or self.is_mask(right)
            case ast.UnaryOp(operand=operand):
                return self.is_mask(operand)
            case ast.Call(func=ast.Attribute(attr="bool" | "logical_not" | "isnan" | "isfinite" | "isinf")):
                return True
        return False

    def _is_fault(self, node: ast.AST) -> bool:
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) if name in FETCHES | {"synchronize"}:
                return True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="where"), args=[_]):
                return True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in FACTORIES:
                return all(option.arg != "device" for option in node.keywords)
            case ast.Call(func=ast.Attribute(attr="to"), args=arguments):
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                places = [
                    place.strip("'") for place in [*map(ast.unparse, arguments), options.get("device", "")]
                ]
                if "cpu" in places:
                    return True
                moves = any(place.endswith("device") or place.startswith("cuda") for place in places)
                return moves and options.get("non_blocking") != "True"
            case ast.Call(func=ast.Name(id="float" | "int" | "bool" | "round"), args=[value]):
                return self.is_tensor(value)
            case ast.Call(func=ast.Name(id="max" | "min"), args=[_, _, *_] as values):
                return any(map(self.is_tensor, values))
            case ast.If(test=test) | ast.While(test=test) | ast.Assert(test=test) | ast.IfExp(test=test):
                return self.is_tensor(test)
            case ast.BoolOp(values=values):
                return any(map(self.is_tensor, values[:-1]))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.is_tensor(operand)
            case ast.Subscript(slice=index):
                parts = index.elts if isinstance(index, ast.Tuple) else [index]
                return any(map(self.is_mask, parts))
        return False
