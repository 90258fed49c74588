"""Whether additions stand where they belong, seen from the syntax tree and not from line numbers.

Git reports success when it places a patch without context wrongly; only the checks here notice it.
"""

import ast
import builtins
from collections.abc import Iterator, Mapping, Sequence

from dinocell.upstream.series import Addition, Hook, Patch, marked_name

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def without_additions(text: str) -> str:
    """The text without our lines."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not marked_name(line.rstrip("\r\n")))


def additions_in(text: str) -> dict[str, list[Addition]]:
    """Blocks of our lines by the name of their patch, numbered as in the text without them."""
    found: dict[str, list[Addition]] = {}
    block: list[str] = []
    name = None
    plain = 0
    for line in [*text.splitlines(), ""]:
        marked = marked_name(line)
        if block and marked != name:
            assert name is not None
            found.setdefault(name, []).append(Addition(plain, tuple(block)))
            block = []
        if marked is None:
            plain += 1
        else:
            block.append(line)
        name = marked
    return found


def find_function(tree: ast.Module, name: str) -> _Function | None:
    """A function of a module, or a method given as `Class.name`."""
    scope: Sequence[ast.stmt] = tree.body
    *classes, last = name.split(".")
    for part in classes:
        inner = (n for n in scope if isinstance(n, ast.ClassDef) and n.name == part)
        scope = next((node.body for node in inner), [])
    return next((n for n in scope if isinstance(n, _Function) and n.name == last), None)


def misplaced(text: str, path: str, patches: Sequence[Patch]) -> Mapping[str, list[str]]:
    """Faults of the additions in one file, as sentences by the name of the patch; empty if none.

    The file must compile, and hold every addition of these patches once, complete, in its function and
    at its place.
    """
    wanted = [patch for patch in patches if path in patch.additions]
    problems: dict[str, list[str]] = {}
    try:
        tree = ast.parse(text)
        compile(tree, path, "exec")
    except (SyntaxError, ValueError) as error:
        return {patch.name: [f"{path} does not compile ({error})"] for patch in wanted}
    found = additions_in(text)
    lines = text.splitlines()
    for patch in wanted:
        expected = [item.lines for item in patch.additions[path]]
        blocks = [item.lines for item in found.get(patch.name, [])]
        sentences = problems.setdefault(patch.name, [])
        if blocks != expected:
            sentences.append(
                f"{path} must hold its {sum(map(len, expected))} lines once and in order, got "
                f"{sum(map(len, blocks))}"
            )
            continue
        starts = [
            number
            for number, line in enumerate(lines, 1)
            if marked_name(line) == patch.name
            and (number == 1 or marked_name(lines[number - 2]) != patch.name)
        ]
        for hook, start, block in zip(patch.hooks_of(path), starts, expected, strict=True):
            last = start + len(block) - 1
            if trouble := _trouble(tree, hook, start, last):
                sentences.append(f"{path}:{start} {trouble}")
    return {name: sentences for name, sentences in problems.items() if sentences}


def _trouble(tree: ast.Module, hook: Hook, line: int, last: int) -> str:
    """Why a block of these lines is not where its hook says; empty if it is."""
    function = find_function(tree, hook.function)
    if function is None:
        return f"must stand in {hook.function}, which does not exist"
    assert function.end_lineno is not None
    if not function.lineno < line <= function.end_lineno:
        return f"must stand in {hook.function}, got another place"
    for body in _bodies(function):
        index = next((i for i, node in enumerate(body) if node.lineno == line), None)
        if index is None:
            continue
        if hook.place == "first":
            documented = ast.get_docstring(function, clean=False) is not None
            right = body is function.body and index == int(documented)
            wrong = "" if right else f"must be the first statement of {hook.function}"
            return wrong or _unknown(tree, function, line, last)
        if hook.place == "after":
            near = body[index - 1] if index else None
        else:
            near = next((node for node in body if node.lineno > last), None)
        if near is not None and hook.landmark in _names(near):
            return _unknown(tree, function, line, last)
        return f"must stand {hook.place} the statement with {hook.landmark} in {hook.function}"
    return f"must be a statement of {hook.function}, got a part of another"


def _unknown(tree: ast.Module, function: _Function, line: int, last: int) -> str:
    """Names that a block uses and its function does not have, such as a renamed parameter."""
    known = set(dir(builtins)).union(*map(_bound, [*tree.body, *ast.walk(function)]))
    used = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and line <= node.lineno <= last
    }
    unknown = ", ".join(sorted(used - known))
    return unknown and f"must use names that {function.name} has, got {unknown}"


def _bound(node: ast.AST) -> set[str]:
    """Names that one node binds: a definition, imports, parameters, targets."""
    if isinstance(node, _Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.arg):
        return {node.arg}
    return {
        inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
    }


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for inner in ast.walk(node):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(inner, name, None)
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                yield body


def _names(node: ast.AST) -> set[str]:
    """Names that a statement uses or binds: of variables, attributes, parameters and keywords."""
    attributes = ("id", "attr", "arg")
    return {getattr(inner, name, None) or "" for inner in ast.walk(node) for name in attributes}
