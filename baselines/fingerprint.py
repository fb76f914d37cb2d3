"""Which code a run depends on, and a hash of it that comments, docstrings and layout do not change.

Of the baselines, the definitions that training reaches, followed by name from `baselines.run`; of a table, such as
`METHODS`, the entry that the configuration picks, and nothing of what stands under `if config.<field>:` where that
field is off, so that a new comparator or option makes no stored run out of date. Of apo, the files that a rule or the
shell may reach.
"""

import ast
import copy
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from baselines.config import Config

ROOT: Final = Path(__file__).parents[1]
START: Final = (("baselines.run", "Run"), ("baselines.run", "load_task"))
START_OF: Final = {"pbt": (("baselines.comparators.pbt", "train"),)}
TABLES: Final = {"METHODS": "method", "OPTIMIZERS": "optimizer", "MODELS": "model", "LOADERS": "data"}
VALUES: Final = ("Config",)  # its values are hashed apart, and its checks do not train
# Of apo: what no training uses, what belongs to one meta-optimizer, and what belongs to K-FAC.
ASIDE: Final = ("__init__", "oracle", "record", "replaying")
OF_META: Final = {"newton": "newton", "gradient": "paper"}
OF_KFAC: Final = ("fisher", "graphs", "layers", "observing")
RULES: Final = {
    "sgdm": "sgd",
    "adamw": "adam",
    "adam-eps-inside": "quasi_adam",
    "quasi-adam": "quasi_adam",
    "quasi-adam-switch": "quasi_adam",
}


class _Chosen(NamedTuple):
    """Those values of a configuration that decide which code runs."""

    method: str
    optimizer: str
    model: str
    data: str
    meta: str
    uses_rule: bool
    augment: bool
    clip: float | None


class _WithoutWhatIsOff(ast.NodeTransformer):
    """Drops what stands under `if config.<field>:` for a field that is off."""

    def __init__(self, chosen: _Chosen) -> None:
        self.off = {f"config.{name}" for name, value in chosen._asdict().items() if not value}

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test).removeprefix("self.") in self.off else node


class _WithoutDocstrings(ast.NodeTransformer):
    """Drops every expression that is a bare string."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@cache
def _parse(path: Path) -> ast.Module:
    tree: ast.Module = _WithoutDocstrings().visit(ast.parse(path.read_text(encoding="utf-8")))
    return tree


@cache
def _text(path: Path) -> str:
    return ast.unparse(_parse(path))


def _path(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """The statements at the top of a module, by the names that they define."""
    found: dict[str, ast.stmt] = {}
    for statement in _parse(_path(module)).body:
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = statement
            case ast.Assign(targets=targets):
                found |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = statement
            case ast.ImportFrom(names=names):
                found |= {alias.asname or alias.name: statement for alias in names}
    return found


def _entry(statement: ast.stmt, key: str) -> ast.AST:
    """The value under a key of a table that is written as one dictionary."""
    assert isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict)
    keys = [entry.value if isinstance(entry, ast.Constant) else None for entry in statement.value.keys]
    return statement.value.values[keys.index(key)]


def _origin(module: str, name: str) -> str | None:
    """The module or definition of the baselines that a name at the top of a module was imported from, if it was."""
    statement = _definitions(module).get(name)
    if not isinstance(statement, ast.ImportFrom) or not str(statement.module).startswith("baselines"):
        return None
    return f"{statement.module}." + next(a.name for a in statement.names if (a.asname or a.name) == name)


def _uses(module: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """The definitions of the baselines that some code of a module names, as module and name."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            origin = _origin(module, part.value.id)
            if origin is not None and _path(origin).exists():
                yield origin, part.attr
        elif isinstance(part, ast.Name) and part.id in _definitions(module):
            origin = _origin(module, part.id)
            if origin is not None and not _path(origin).exists():
                of, _, name = origin.rpartition(".")
                yield of, name
            elif origin is None and not isinstance(_definitions(module)[part.id], ast.ImportFrom):
                yield module, part.id


def _reached(chosen: _Chosen) -> Iterator[tuple[str, str, str]]:
    """Module, name and code of every definition in the baselines that training reaches."""
    left = [*START, *START_OF.get(chosen.method, ())]
    seen = set(left)
    without = _WithoutWhatIsOff(chosen)
    while left:
        module, name = left.pop()
        statement = _definitions(module)[name]
        node = _entry(statement, str(getattr(chosen, TABLES[name]))) if name in TABLES else statement
        node = without.visit(copy.deepcopy(node))
        yield module, name, ast.unparse(node)
        found = {pair for pair in _uses(module, node) if pair[1] not in VALUES} - seen
        left += sorted(found)
        seen |= found


def _of_apo(chosen: _Chosen) -> Iterator[Path]:
    """The files of apo that may change the outcome of a run."""
    if chosen.method != "apo" and not chosen.uses_rule:
        return
    for path in [*sorted((ROOT / "apo").glob("*.py")), *sorted((ROOT / "apo" / "bases").glob("*.py"))]:
        own = chosen.method == "apo" and OF_META.get(path.stem, chosen.meta) == chosen.meta
        if path.stem not in ASIDE and (own or path.stem not in OF_META):
            if chosen.optimizer == "kfac" or path.stem not in OF_KFAC:
                yield path
    if chosen.uses_rule:
        yield ROOT / "apo" / "rules" / f"{RULES.get(chosen.optimizer, chosen.optimizer.replace('-', '_'))}.py"


def fingerprint(config: Config) -> str:
    """A hash of the code that a run depends on: 12 hexadecimal digits."""
    return _fingerprint(_Chosen(*(getattr(config, name) for name in _Chosen._fields)))


@cache
def _fingerprint(chosen: _Chosen) -> str:
    digest = hashlib.sha256()
    for module, name, code in sorted(_reached(chosen)):
        digest.update(f"{module}.{name}\n{code}\n".encode())
    for path in _of_apo(chosen):
        digest.update(f"{path.relative_to(ROOT)}\n{_text(path)}\n".encode())
    return digest.hexdigest()[:12]
