"""What a chapter shows of an exported name: signature, docstring, parameters and their comments."""

import ast
import dataclasses
import inspect
import textwrap
import tokenize
import typing
from io import StringIO


def comments(obj):
    "{parameter, field or `return`: its comments}, on any of its lines; fastcore reads the first."
    try:
        source = textwrap.dedent(inspect.getsource(obj))
    except (OSError, TypeError):  # a class without a constructor of its own
        return {}
    node, lines, found = ast.parse(source).body[0], source.splitlines(), {}
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        starts = {n.lineno: n.target.id for n in fields}
        last = max((n.end_lineno for n in fields), default=0)
    else:
        a, last = node.args, node.body[0].lineno - 1
        every = (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)
        starts = {p.lineno: p.arg for p in every if p}
        closing = (n for n in range(node.lineno, last + 1) if lines[n - 1].startswith(")"))
        starts[next(closing, last)] = "return"
    for token in tokenize.generate_tokens(StringIO(source).readline):
        at = token.start[0]
        if token.type == tokenize.COMMENT and min(starts, default=at + 1) <= at <= last:
            name = starts[max(n for n in starts if n <= at)]
            found[name] = f"{found.get(name, '')} {token.string.lstrip('# ')}".strip()
    return found


def show_type(kind):
    "A type as one would write it, without module names and without pydantic's constraints."
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if "Union" in str(origin):
        return " | ".join(map(show_type, args))
    if origin:
        return f"{show_type(origin)}[{', '.join(map(show_type, args))}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def show_default(obj, parameter):
    "A default as one would write it; of a dataclass field, what its factory makes."
    value = parameter.default
    if value is parameter.empty:
        return ""
    if repr(value) == "<factory>":
        value = obj.__dataclass_fields__[parameter.name].default_factory()
        if dataclasses.is_dataclass(value):
            return f"{type(value).__name__}()"
    return getattr(value, "__qualname__", repr(value))


def table(head, rows):
    "A markdown table, without its empty columns; nothing, if nobody described anything."
    if not any(row[-1] for row in rows):
        return ""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(
        " | ".join(row[i].replace("|", "\\|") for i in used).join(("| ", " |")) for row in lines
    )


def code(text):
    return f"`{text}`" if text else ""


def show_doc(obj, name=None):
    "Markdown for `obj`; for a class also the methods that have a docstring."
    obj = inspect.unwrap(getattr(obj, "fget", obj))
    name, is_class, described = name or obj.__qualname__, inspect.isclass(obj), obj
    if is_class and not dataclasses.is_dataclass(obj):
        described = next((getattr(obj, n) for n in ("__init__", "__new__") if n in vars(obj)), None)
    beside, hints = comments(described), typing.get_type_hints(described) if described else {}
    arguments, rows = [], []
    for p in inspect.signature(obj).parameters.values() if described else ():
        plain, default = str(p.replace(annotation=p.empty, default=p.empty)), show_default(obj, p)
        arguments.append(f"{plain}={default}" if default else plain)
        kind = show_type(hints[p.name]) if p.name in hints else ""
        rows.append((code(plain), code(kind), code(default), beside.get(p.name, "")))
    result = "" if is_class or "return" not in hints else show_type(hints["return"])
    if "return" in beside and not is_class:
        rows.append(("*returns*", code(result), "", beside["return"]))
    signature = textwrap.fill(
        f"{'class ' * is_class}{name}({', '.join(arguments)})", 80, subsequent_indent="    "
    )
    methods = [
        (code(key), value.__doc__.splitlines()[0])
        for key, value in (vars(obj).items() if is_class else ())
        if key[0] != "_"
        and value.__doc__
        and value.__doc__
        not in [getattr(b, key).__doc__ for b in obj.__mro__[1:] if hasattr(b, key)]
        and (inspect.isroutine(value) or isinstance(value, property))
    ]
    parts = (
        f"### `{name}`",
        f"```python\n{signature}{f' -> {result}' * bool(result)}\n```",
        inspect.getdoc(obj) or "",
        table(("Parameter", "Type", "Default", "Meaning"), rows),
        table(("Method", "What it does"), methods),
    )
    return "\n\n".join(filter(None, parts))
