"""MODEL arguments: where a model and its example batch come from.

    file.py:factory           any Python file
    package.module:factory    anything importable
    name                      a registered model: the zoo of the tests, the benchmark models

`factory()` returns `(module, example_batch)`. Everything that can be wrong with an argument is an
OptionError that shows what is there instead.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import OptionError

_LOG = logging.getLogger(__name__)
_BATCH_ROWS = 8  # of the registered benchmark models
_ZOO_TABLES = ("ZOO", "SIZES")  # the tiny models, and published sizes of the same
_FORMS = "MODEL is file.py:factory, package.module:factory, or a name that `autopar models` lists"

Factory = Callable[[], tuple[nn.Module, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """on_meta: without data, for planning only."""

    module: nn.Module
    example_batch: Any
    name: str
    on_meta: bool = False


def load_model(
    text: str, *, dtype: torch.dtype | str | None = None, meta: bool = False
) -> LoadedModel:
    """The model of a MODEL argument.

    dtype: of parameters, buffers and batch where they are floating; as built without one.
    meta:  build without memory, for planning; a factory that cannot is called once more, for real.
    """
    factory, name = find_factory(text)
    on_meta = meta
    if meta:
        try:
            with torch.device("meta"):
                made = _checked(factory(), name)
        except Exception as error:  # whatever a user's code does with tensors that have no data
            _LOG.info("%s cannot be built on meta (%s): building it for real", name, error)
            on_meta, made = False, _called(factory, name)
    else:
        made = _called(factory, name)
    module, batch = made
    if dtype is not None:
        wanted = parse_dtype(dtype)
        module = module.to(wanted)
        batch = pytree.tree_map_only(Tensor, lambda t: _cast(t, wanted), batch)
    return LoadedModel(module, batch, name, on_meta)


def load_pair(text: str) -> tuple[nn.Module, Any]:
    """(module, example_batch) of a MODEL argument, for processes that each make their own."""
    loaded = load_model(text)
    return loaded.module, loaded.example_batch


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """ "float32" as torch.float32. OptionError for what is no floating type."""
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"a dtype is float32, float64, bfloat16 or float16: got {dtype!r}")
    return found


def find_factory(text: str) -> tuple[Factory, str]:
    """The factory that a MODEL argument names, and a short name for it."""
    where, colon, name = text.rpartition(":")
    if not colon:
        return _registered(text), text
    if not where or not name:
        raise OptionError(f"{_FORMS}: got {text!r}")
    module = _file_module(Path(where)) if where.endswith(".py") else _named_module(where)
    factory: Any = module
    for part in name.split("."):
        found = getattr(factory, part, None)
        if found is None:
            raise OptionError(_no_factory(where, name, module))
        factory = found
    if not callable(factory):
        raise OptionError(
            f"{name} of {where} is a {type(factory).__name__}, not a factory: it must be callable"
            " without arguments and return (module, example_batch)"
        )
    return factory, name


def registered_models() -> dict[str, Factory]:
    """Every registered name that can be imported here: the zoo's, its published sizes, and the
    benchmark models'."""
    return {name: factory for table in _tables() for name, factory in table.items()}


def _tables() -> Iterator[Mapping[str, Factory]]:
    """The zoo's last, since it imports transformers. No name is in two of them."""
    cases = _optional("benchmarks.models", "MODELS")
    yield {name: _benchmark_factory(case) for name, case in cases.items()}
    for table in _ZOO_TABLES:
        yield _optional("tests.zoo", table)


def model_sources() -> dict[str, str]:
    """Registered name -> one line about the model, from its factory's docstring or its module."""
    lines = {}
    for name, case in _optional("benchmarks.models", "MODELS").items():
        count = f"{case.items_per_sample} {case.kind} per row"
        lines[name] = f"benchmarks.models, batch {_BATCH_ROWS}, {count}"
    for table in _ZOO_TABLES:
        for name, model in _optional("tests.zoo", table).items():
            lines[name] = f"tests.zoo: {model.summary}"
    return lines


def _optional(module: str, table: str) -> Mapping[str, Any]:
    """A table of a module that need not be there: the installed package has no tests, and the zoo
    needs transformers. The working directory counts, as for `python -m`."""
    _search_in(Path.cwd())
    try:
        found: Mapping[str, Any] = getattr(importlib.import_module(module), table)
    except ImportError as error:
        _LOG.info("the models of %s are not available: %s", module, error)
        return {}
    return found


def _benchmark_factory(case: Any) -> Factory:
    def factory() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return case.build().train(), case.batch(_BATCH_ROWS)

    return factory


def _registered(name: str) -> Factory:
    for table in _tables():
        if name in table:
            return table[name]
    raise OptionError(f"no model is called {name!r}{_close(name, registered_models())}. {_FORMS}")


def _file_module(path: Path) -> ModuleType:
    """The file as a module of its own name, with its directory importable, as if it were run."""
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        there = sorted(str(p) for p in folder.glob("*.py"))
        raise OptionError(
            f"no such file: {path}{_close(str(path), there)}. Python files in {folder.resolve()}:"
            f" {', '.join(Path(p).name for p in there) or 'none'}"
        )
    _search_in(Path.cwd())
    _search_in(path.parent.resolve())
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise OptionError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if previous is not None:
            sys.modules[path.stem] = previous
        raise OptionError(f"{path} fails when it is imported:\n{_traceback(error)}") from error
    return module


def _named_module(name: str) -> ModuleType:
    _search_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise OptionError(
                f"no module is called {error.name!r}: the part before ':' is a .py file or a module"
                " that Python can import from here"
            ) from error
        raise OptionError(f"{name} fails when it is imported:\n{_traceback(error)}") from error
    except Exception as error:
        raise OptionError(f"{name} fails when it is imported:\n{_traceback(error)}") from error


def _search_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _no_factory(where: str, name: str, module: ModuleType) -> str:
    own = [
        key
        for key, value in vars(module).items()
        if callable(value)
        and not key.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
    ]
    return f"{where} has no {name!r}{_close(name, own)}. It has: {', '.join(own) or 'nothing'}"


def _called(factory: Factory, name: str) -> tuple[nn.Module, Any]:
    try:
        made = factory()
    except Exception as error:
        raise OptionError(f"the factory {name} fails:\n{_traceback(error)}") from error
    return _checked(made, name)


def _checked(made: Any, name: str) -> tuple[nn.Module, Any]:
    if not isinstance(made, (tuple, list)) or len(made) != 2 or not isinstance(made[0], nn.Module):
        got = type(made).__name__
        if isinstance(made, (tuple, list)):
            got += f" of ({', '.join(type(item).__name__ for item in made)})"
        raise OptionError(
            f"the factory {name} must return (module, example_batch), a torch.nn.Module and what it"
            f" is called with: got {got}"
        )
    return made[0], made[1]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _traceback(error: BaseException) -> str:
    """The user's own frames: those below this file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    lines = traceback.format_list(own) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _close(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f", did you mean {' or '.join(matches)}?" if matches else ""
