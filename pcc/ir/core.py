"""Hash-consed IR nodes: structural equality is identity, so CSE costs nothing.

An op is a class whose annotated fields are its operands (`Op`, `tuple[Op, ...]`) and attributes
(`int`, `float`, `str`, `bool`, `tuple[int, ...]`, `Array`). Building the same node twice gives the
same object. Keys hold operand identities (operands outlive their readers) and exact attribute bits,
so 0.0 and -0.0 stay apart; a field's declared kind keeps 1 and True apart.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, dataclass_transform
from weakref import WeakValueDictionary

import numpy as np

from pcc.errors import PccError
from pcc.ir.array import Array
from pcc.ir.places import place, place_of
from pcc.ir.types import NARROW, Tensor, Type, Units

Uses: TypeAlias = dict["Op", int]
Values: TypeAlias = np.ndarray[Any, Any]
OPS: dict[str, type[Op]] = {}
_LIVE: WeakValueDictionary[tuple[object, ...], Op] = WeakValueDictionary()
_LOCK = threading.Lock()


def _op(v: object) -> Op:
    if not isinstance(v, Op):
        raise PccError("E104", f"expected an IR value, got {type(v).__name__}")
    return v


def _int(v: object) -> int:
    if isinstance(v, bool) or not isinstance(v, int | np.integer):
        raise PccError("E104", f"expected an int, got {v!r}")
    return int(v)


def _str(v: object) -> str:
    if not isinstance(v, str):
        raise PccError("E104", f"expected a string, got {v!r}")
    return v


def _bool(v: object) -> bool:
    if not isinstance(v, bool):
        raise PccError("E104", f"expected true or false, got {v!r}")
    return v


def _float(v: object) -> float:
    if isinstance(v, bool) or not isinstance(v, int | float | np.floating):
        raise PccError("E104", f"expected a float, got {v!r}")
    return float(v)


def _array(v: object) -> Array:
    return v if isinstance(v, Array) else Array.of(v)


def _tuple(one: Callable[[object], Any]) -> Callable[[object], Any]:
    def many(v: object) -> tuple[Any, ...]:
        if isinstance(v, str | Op) or not isinstance(v, Iterable):
            raise PccError("E104", f"expected a list, got {v!r}")
        return tuple(map(one, v))

    return many


# declared kind -> (canonicalise, is an operand, key)
KINDS: dict[str, tuple[Callable[[object], Any], bool, Callable[[Any], object]]] = {
    "Op": (_op, True, id),
    "tuple[Op, ...]": (_tuple(_op), True, lambda v: tuple(map(id, v))),
    "int": (_int, False, int),
    "float": (_float, False, float.hex),
    "str": (_str, False, str),
    "bool": (_bool, False, bool),
    "tuple[int, ...]": (_tuple(_int), False, tuple),
    "Array": (_array, False, id),
}


class _Interned(type):
    if not TYPE_CHECKING:

        def __call__(cls, *args, loc="", **kwargs):
            values = cls._bind(args, kwargs)
            key = (cls, *(k(v) for k, v in zip(cls._keys, values, strict=True)))
            with _LOCK:
                found = _LIVE.get(key)
            if found is not None:
                place(found, loc)
                return found
            node = object.__new__(cls)
            store = node.__dict__
            for name, value in zip(cls.fields, values, strict=True):
                store[name] = value
            place(node, loc)
            store["args"] = cls._operands(values)
            node.refuse_narrow()
            store["type"] = node.infer()
            with _LOCK:
                return _LIVE.setdefault(key, node)


@dataclass_transform(frozen_default=True, eq_default=False, kw_only_default=False)
class Op(metaclass=_Interned):
    """An IR node. Subclass with `name=` to declare an op; the annotated fields are its operands."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ()
    opaque: ClassVar[bool] = False  # not a polynomial of its operands: a leaf in exact checks
    stored: ClassVar[tuple[str, ...]] = ()  # the operands that may be held in fewer bits
    _keys: ClassVar[tuple[Callable[[Any], object], ...]] = ()
    if TYPE_CHECKING:
        type: Type
        args: tuple[Op, ...]

    def __init_subclass__(cls, name: str = "") -> None:
        own = {k: v for k, v in inspect.get_annotations(cls).items() if "ClassVar" not in str(v)}
        cls.fields = (*cls.fields, *own)
        cls.kinds = (*cls.kinds, *(str(v) for v in own.values()))
        cls._keys = tuple(KINDS[k][2] for k in cls.kinds)
        if name:
            if name in OPS:
                raise TypeError(f"op {name!r} is declared twice: {OPS[name]} and {cls}")
            cls.name = name
            OPS[name] = cls

    @classmethod
    def _bind(cls, args: tuple[object, ...], kw: dict[str, object]) -> tuple[Any, ...]:
        if len(args) > len(cls.fields):
            raise PccError("E104", f"'{cls.name}' takes {len(cls.fields)} fields, got {len(args)}")
        given = dict(zip(cls.fields, args, strict=False))
        for k, v in kw.items():
            if k not in cls.fields or k in given:
                raise PccError("E104", f"'{cls.name}' has no free field {k!r}")
            given[k] = v
        out = []
        for field, kind in zip(cls.fields, cls.kinds, strict=True):
            if field in given:
                out.append(KINDS[kind][0](given[field]))
            elif hasattr(cls, field):
                out.append(getattr(cls, field))
            else:
                raise PccError("E104", f"'{cls.name}' needs {field!r}")
        return tuple(out)

    @classmethod
    def _operands(cls, values: tuple[Any, ...]) -> tuple[Op, ...]:
        out: list[Op] = []
        for kind, v in zip(cls.kinds, values, strict=True):
            if kind == "Op":
                out.append(v)
            elif kind == "tuple[Op, ...]":
                out.extend(v)
        return tuple(out)

    def infer(self) -> Type:
        """Return the result type, or raise `PccError` for an ill-typed node."""
        raise NotImplementedError(self.name)

    def refuse_narrow(self) -> None:
        """Refuse operands in half precision, or i8, where the op does not say how it takes them.

        Errors: E112.
        """
        for arg in self.args:
            if isinstance(arg.type, Tensor) and arg.type.dtype in NARROW:
                allowed = [getattr(self, field) for field in self.stored]
                what = f"an operand is {arg.type}: {arg.type.dtype} is for stored values"
                self.require(any(a is arg for a in allowed), "E112", what)

    @property
    def loc(self) -> str:
        """Where the node comes from, or ''. Not a part of it: see `pcc.ir.places`."""
        return place_of(self)

    @property
    def attrs(self) -> dict[str, Any]:
        """Non-operand fields by name."""
        pairs = zip(self.fields, self.kinds, strict=True)
        return {f: getattr(self, f) for f, k in pairs if not KINDS[k][1]}

    def require(self, ok: bool, code: str, what: str, hint: str = "") -> None:
        """Raise a `PccError` at this node unless `ok`."""
        if not ok:
            raise PccError(code, f"'{self.name}': {what}", at=self.loc, hint=hint)

    def with_args(self, new: tuple[Op, ...]) -> Op:
        """Return this node over other operands (itself if they are the same)."""
        if all(a is b for a, b in zip(self.args, new, strict=True)):
            return self
        it, kw = iter(new), {}
        for f, k in zip(self.fields, self.kinds, strict=True):
            v = getattr(self, f)
            if k == "Op":
                v = next(it)
            elif k == "tuple[Op, ...]":
                v = tuple(next(it) for _ in v)
            kw[f] = v
        return type(self)(**kw, loc=self.loc)  # type: ignore[call-arg]

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(f"'{self.name}' is immutable")

    def __repr__(self) -> str:
        return f"<{self.name} : {self.type}>"


def postorder(*roots: Op, leaf: Callable[[Op], bool] = lambda _: False) -> Iterator[Op]:
    """Yield every node once, operands first; nothing below a `leaf`.

    Iterative: circuits are deep.
    """
    seen: set[Op] = set()
    stack = [(r, False) for r in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not leaf(node):
                stack.extend((a, False) for a in reversed(node.args) if a not in seen)


def rewrite(roots: tuple[Op, ...], rule: Callable[[Op, Uses], Op | None]) -> tuple[Op, ...]:
    """Rebuild bottom-up, replacing a node when `rule` returns one."""
    uses, new = use_counts(*roots), dict[Op, Op]()
    for node in postorder(*roots):
        rebuilt = node.with_args(tuple(new[a] for a in node.args))
        uses[rebuilt] = uses[node]  # rules see the original graph's use counts
        out = rule(rebuilt, uses) or rebuilt
        if out is not rebuilt:
            uses[out] = uses[node]
            place(out, node.loc)  # a replacement inherits its origin
        new[node] = out
    return tuple(new[r] for r in roots)


def use_counts(*roots: Op) -> Uses:
    """Count the readers of every node; a root counts as read once."""
    uses: Uses = {}
    for r in roots:
        uses[r] = uses.get(r, 0) + 1
    for node in postorder(*roots):
        uses.setdefault(node, 0)
        for a in node.args:
            uses[a] = uses.get(a, 0) + 1
    return uses


def units(n: Op) -> Units:
    """Return `n.type`, which must be circuit units."""
    if not isinstance(n.type, Units):
        raise PccError("E101", f"expected units, got {n.type}", at=n.loc)
    return n.type


def tensor(n: Op) -> Tensor:
    """Return `n.type`, which must be a tensor."""
    if not isinstance(n.type, Tensor):
        raise PccError("E101", f"expected a tensor, got {n.type}", at=n.loc)
    return n.type
