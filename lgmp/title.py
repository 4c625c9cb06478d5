"""What ps and top show of a process: its title, which is its own to say."""

from __future__ import annotations

import os
from importlib.machinery import PathFinder

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from types import ModuleType


def set_title(words: str, thread: str | None = None) -> None:
    """Have ps show `words`, and `thread` where there is room for a name alone. There may be any file's name in them."""
    library = _library()
    library.setproctitle(os.fsencode(words).decode(errors="replace"))
    if thread is not None:
        library.setthreadtitle(thread)


def _library() -> ModuleType:
    """setproctitle's compiled part. The package itself imports logging as well, ten times as much as that needs."""
    package = PathFinder.find_spec("setproctitle")
    if package is not None:
        name = "setproctitle._setproctitle"
        compiled = PathFinder.find_spec(name, package.submodule_search_locations)
        if compiled is not None and compiled.loader is not None:
            # Not importlib.util, which would import more in its turn.
            module = compiled.loader.create_module(compiled)
            if module is not None:
                compiled.loader.exec_module(module)
                return module
    import setproctitle  # noqa: PLC0415  says what is missing, or does without

    return setproctitle
