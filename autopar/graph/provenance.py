"""Where each traced operator came from: its module call and its line of source.

Module calls are published by forward hooks into the metadata that torch.fx copies to new nodes;
source lines are read off the Python stack when a node is made. Backward nodes carry neither: they
get both from their forward partner (`graph.convert`), found by autograd's sequence number.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.fx.proxy
import torch.fx.traceback as fx_traceback
from torch import nn

from autopar.graph.patches import replaced

MODULE_KEY = "nn_module_stack"  # one of the few keys that torch.fx copies to every node
SOURCE_KEY = "autopar_source"
_TORCH = os.path.dirname(torch.__file__) + os.sep
_AUTOPAR = os.path.dirname(os.path.dirname(__file__)) + os.sep
_CALL = re.compile(r"@\d+")
_ENTRY = os.path.join(os.path.dirname(__file__), "capture.py")


@contextlib.contextmanager
def recorded_provenance(root: nn.Module) -> Iterator[None]:
    """Nodes made inside the block carry :data:`MODULE_KEY` and, in forward, :data:`SOURCE_KEY`."""
    with fx_traceback.preserve_node_meta(), _module_paths(root), _source_lines():
        yield


@contextlib.contextmanager
def _module_paths(root: nn.Module) -> Iterator[None]:
    """Publish the path of the running module. The k-th repeated call of a path reads "@k"."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    stack: list[str] = []
    calls: Counter[str] = Counter()

    def publish() -> None:
        fx_traceback.current_meta[MODULE_KEY] = {stack[-1] if stack else "": ("", "")}

    def enter(module: nn.Module, _args: Any) -> None:
        if module is root:  # AOTAutograd runs forward twice: once for metadata, once to trace
            stack.clear()
            calls.clear()
        path = _path_within(names[module], stack[-1] if stack else "")
        stack.append(f"{path}@{calls[path]}" if calls[path] else path)
        calls[path] += 1
        publish()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if stack:
            stack.pop()
        publish()

    with contextlib.ExitStack() as handles:
        for module in names:
            for handle in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ):
                handles.callback(handle.remove)
        yield


def _path_within(names: list[str], caller: str) -> str:
    """Path of a module below the call that calls it, such as "block@1.linear"; a module that lies
    elsewhere goes by its first name."""
    prefix = _CALL.sub("", caller) + "." if caller else ""
    name = next((name for name in names if name.startswith(prefix)), None)
    return names[0] if name is None else (f"{caller}." if caller else "") + name[len(prefix) :]


@contextlib.contextmanager
def _source_lines() -> Iterator[None]:
    original = torch.fx.proxy.TracerBase.create_node

    def create_node(self: Any, *args: Any, **kwargs: Any) -> Any:
        node = original(self, *args, **kwargs)
        if node.op == "call_function":
            node.meta[SOURCE_KEY] = _source_of(sys._getframe(1))
        return node

    with replaced(torch.fx.proxy.TracerBase, "create_node", create_node):
        yield


def _source_of(frame: FrameType | None) -> str:
    """Innermost frame outside torch and autopar, or "" where capture itself made the call."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _ENTRY:
            return ""
        if _is_foreign(file):
            return f"{_short(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def error_source(error: BaseException) -> str:
    """ "file.py:line (code)" of the innermost foreign frame that an exception passed, or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    entry = max((i for i, f in enumerate(frames) if f.filename == _ENTRY), default=-1)
    foreign = [f for f in frames[entry + 1 :] if _is_foreign(f.filename)]
    if not foreign:
        return ""
    return f"{_short(foreign[-1].filename)}:{foreign[-1].lineno} `{foreign[-1].line}`"


def _is_foreign(file: str) -> bool:
    return not file.startswith((_TORCH, _AUTOPAR, "<")) and os.sep + "contextlib.py" not in file


def _short(file: str) -> str:
    """The path below the longest entry of the import path that holds it."""
    roots = [p.rstrip(os.sep) + os.sep for p in sys.path if p]
    holds = [root for root in roots if file.startswith(root)]
    return file[len(max(holds, key=len)) :] if holds else file
