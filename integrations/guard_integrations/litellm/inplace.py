"""Functions replaced in place, so that every name that was bound to them before is guarded too.

``from litellm import completion`` keeps the function object, and so do a Router's attributes, partials and other
libraries. So not the name is replaced but the code of the function: its object stays, and what it did before lives on
in a function of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

_HANDLER = "the handler stands here"


def _call(*args: Any, **kwargs: Any) -> Any:
    handler: Any = "the handler stands here"
    return handler(*args, **kwargs)


async def _acall(*args: Any, **kwargs: Any) -> Any:
    handler: Any = "the handler stands here"
    return await handler(*args, **kwargs)


class Replaced:
    """``function`` calls ``handler(original, args, kwargs)`` from now on, until ``restore``.

    ``handler`` returns what the caller gets, or a coroutine for it where ``function`` is a coroutine function.
    """

    def __init__(self, function: FunctionType, handler: Callable[[Callable[..., Any], Any, Any], Any]) -> None:
        self.function, self._code = function, function.__code__
        original = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        original.__kwdefaults__ = function.__kwdefaults__
        original.__dict__.update(function.__dict__)
        self.original = original

        def handle(*args: Any, **kwargs: Any) -> Any:
            return handler(original, args, kwargs)

        template = _acall if inspect.iscoroutinefunction(function) else _call
        self._guarded = _with(template.__code__, handle, like=function.__code__)
        function.__code__ = self._guarded

    @property
    def in_place(self) -> bool:
        """Whether the function is still ours: another library may have replaced it since."""
        return self.function.__code__ is self._guarded

    def restore(self) -> None:
        if self.in_place:
            self.function.__code__ = self._code


def _with(code: CodeType, handler: Callable[..., Any], like: CodeType) -> CodeType:
    """``code`` that calls ``handler``, which is one of its constants: nothing that a caller passes can displace it."""
    consts: Any = tuple(handler if const == _HANDLER else const for const in code.co_consts)
    # A function takes only code with as many free variables as its closure holds.
    return code.replace(co_consts=consts, co_freevars=like.co_freevars, co_name=like.co_name)


def innermost(function: Any, decorated_by: Callable[..., Any]) -> FunctionType:
    """The function that ``decorated_by`` made of ``function``, under whatever decorators lie over it.

    Raises ``LookupError``.
    """
    made_in = f"{decorated_by.__qualname__}.<locals>."
    found = function
    while found is not None:
        if isinstance(found, FunctionType) and found.__code__.co_qualname.startswith(made_in):
            return found
        found = getattr(found, "__wrapped__", None)
    raise LookupError(getattr(function, "__name__", str(function)))
