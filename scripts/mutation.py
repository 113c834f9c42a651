"""Mutants of Python functions: each differs from the source in one place of one function's body. Knows nothing of what is mutated."""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """One change in one function: ``what`` is the place before and after, ``text`` the whole mutated file, ``key`` known by its content."""

    module: str
    function: str
    what: str
    text: str
    key: str


COMMUTATIVE = {"min", "max", "minimum", "maximum"}
"""Functions whose first two arguments may change places."""


def called(node: ast.Call) -> str:
    """The last name of what is called: ``maximum`` of ``torch.maximum(a, b)``."""
    return ast.unparse(node.func).rpartition(".")[2]


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """(kind of change, what stands in the node's place; None: the statement is skipped)."""
    if isinstance(node, ast.BinOp):
        kind = type(node.op)
        if kind in (ast.Add, ast.Sub):
            yield "addend dropped", node.left
            yield "addend dropped", node.right
            yield "sign flipped", ast.BinOp(node.left, ast.Sub() if kind is ast.Add else ast.Add(), node.right)
        elif kind in (ast.Mult, ast.MatMult):
            yield "factor dropped", node.left
            yield "factor dropped", node.right
        elif kind in (ast.Div, ast.FloorDiv):
            yield "divisor dropped", node.left
            yield "multiplied", ast.BinOp(node.left, ast.Mult(), node.right)
        elif kind is ast.Pow:
            yield "exponent dropped", node.left
        elif kind is ast.BitOr:
            yield "half of a union dropped", node.left
            yield "half of a union dropped", node.right
        elif kind is ast.BitAnd:
            yield "condition dropped", node.left
            yield "condition dropped", node.right
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        if not isinstance(node.operand, ast.Constant):
            yield "negation dropped", node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = {
            ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
        }[type(node.ops[0])]  # fmt: skip
        yield "comparison changed", ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield "and/or changed", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.IfExp):
        yield "branch forced", node.body
        yield "branch forced", node.orelse
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant changed", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant changed", ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 2)
    elif isinstance(node, ast.Call):
        plain = not any(isinstance(a, ast.Starred) for a in node.args[:2]) and called(node) not in COMMUTATIVE
        if len(node.args) >= 2 and plain and ast.dump(node.args[0]) != ast.dump(node.args[1]):
            yield "arguments swapped", ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
        of_super = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "super()"
        if not node.args and not node.keywords and isinstance(node.func, ast.Attribute) and not of_super:
            yield "call dropped", node.func.value
        for i, k in enumerate(node.keywords):
            if k.arg is not None:
                yield (
                    f"keyword {k.arg} dropped",
                    ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :]),
                )
    elif isinstance(node, ast.If):
        yield "condition forced", ast.If(ast.Constant(True), node.body, node.orelse)
        yield "condition forced", ast.If(ast.Constant(False), node.body, node.orelse)
    elif (
        isinstance(node, ast.AugAssign)
        or (isinstance(node, ast.Assign) and any(isinstance(t, ast.Subscript) for t in node.targets))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    ):
        yield "statement skipped", None


def functions(tree: ast.Module, only: Callable[[str], bool]) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(name, function) of a module's functions and of its classes' methods."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and only(node.name):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and only(node.name):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name != "__post_init__":
                    yield f"{node.name}.{inner.name}", inner


def places(function: ast.FunctionDef) -> Iterator[tuple[tuple[tuple[str, int | None], ...], ast.AST]]:
    """(path from the function, node) of everything in its body that may be changed."""
    skipped = (ast.Raise, ast.JoinedStr, ast.arguments)

    def walk(node: ast.AST, path: tuple[tuple[str, int | None], ...]) -> Iterator[Any]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
                continue
            children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for i, child in children:
                if not isinstance(child, ast.AST) or isinstance(child, skipped):
                    continue
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                    continue  # a docstring
                if isinstance(child, ast.If) and all(isinstance(s, ast.Raise) for s in child.body) and not child.orelse:
                    continue  # a check of bad input
                here = (*path, (name, i))
                yield here, child
                yield from walk(child, here)

    yield from walk(function, ())


def changed(tree: ast.Module, name: str, path: tuple[tuple[str, int | None], ...], new: ast.AST | None) -> str:
    """The module with one place changed."""
    tree = copy.deepcopy(tree)
    node: Any = dict(functions(tree, lambda _: True))[name]
    for field, i in path[:-1]:
        node = getattr(node, field) if i is None else getattr(node, field)[i]
    field, i = path[-1]
    put = ast.Pass() if new is None else copy.deepcopy(new)
    if i is None:
        setattr(node, field, put)
    else:
        getattr(node, field)[i] = put
    return ast.unparse(ast.fix_missing_locations(tree))


def mutants(module: str, text: str, only: Callable[[str], bool] = lambda name: True) -> Iterator[Mutant]:
    """All mutants of the functions in a module's ``text``; ``only`` chooses functions and classes by name."""
    tree = ast.parse(text)
    for name, function in functions(tree, only):
        said: dict[str, int] = {}
        seen = {ast.dump(function)}
        for path, node in places(function):
            for kind, new in variants(node):
                mutated = changed(tree, name, path, new)
                shape = ast.dump(dict(functions(ast.parse(mutated), lambda _: True))[name])
                if shape in seen:
                    continue
                seen.add(shape)
                before, after = (short(ast.unparse(n)) if n is not None else "pass" for n in (node, new))
                what = f"{kind}: {before} -> {after}"
                said[what] = said.get(what, 0) + 1
                if said[what] > 1:
                    what += f" (place {said[what]})"
                key = hashlib.sha256(f"{module}|{ast.dump(function)}|{shape}".encode()).hexdigest()[:16]
                yield Mutant(module, name, what, mutated, key)


def short(text: str, width: int = 90) -> str:
    """One line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def put(owner: Any, m: Mutant) -> None:
    """Put the mutant into the loaded module ``owner``: everybody who holds the function has the mutated one from now on."""
    found = [c for c in codes(compile(m.text, f"<mutant of {m.module}>", "exec")) if c.co_qualname == m.function]
    holder, _, name = m.function.rpartition(".")
    place = getattr(owner, holder) if holder else owner
    held = vars(place)[name]
    function: Any = inspect.unwrap(held.__func__ if isinstance(held, staticmethod | classmethod) else held)
    (code,) = found
    if code.co_freevars == function.__code__.co_freevars:
        function.__code__ = code
        return
    cells = dict(
        zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    )  # super() is gone, or back
    if isinstance(place, type):
        cells.setdefault("__class__", CellType(place))
    new = FunctionType(
        code, function.__globals__, name, function.__defaults__, tuple(cells[v] for v in code.co_freevars)
    )
    new.__kwdefaults__ = function.__kwdefaults__
    setattr(place, name, new)


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and all inside it."""
    yield code
    for c in code.co_consts:
        if isinstance(c, CodeType):
            yield from codes(c)
