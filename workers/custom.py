"""A device that is somebody's own: `python -m workers.custom OPTIONS -- MODULE:CLASS,key=value` serves it.

The class derives from RequestDevice or Device (workers.device). What a launcher has to know of it are attributes:

    device_type   its virtio id, 1 to 255: that is how a guest's driver finds it
    kind          what `ps` calls it, and with a number the name of the device (the class's name in small letters)
    queue_count   how many rings it has (1)
    features      the mask of the features it offers (indirect tables: 1 << 28)
    config        its configuration space, at most 255 bytes (none)

`key=value` become keyword arguments of the class, strings all of them. `__init__` opens what the device stands on: it
is called before a worker is locked in (--chroot, --username), after that nothing can be opened or imported. It is
called once more, and `close` at once, in a process that tells the launcher of the device and then ends (--describe).
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location

import msgpack

from lgmp.errors import LgmpError
from lgmp.virtio.ids import VIRTIO_RING_F_INDIRECT_DESC
from workers.device import Device

TYPE_CHECKING = False  # as typing's, which is costly to import in a worker
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from workers.runtime import Options


class Defect(Exception):
    """Somebody's own code raised what it should not have; that is this exception's cause."""


class Specification:
    """`MODULE:CLASS[,KEY=VALUE...]`, or FILE.py in the place of MODULE: which class, and its keyword arguments."""

    def __init__(self, text: str) -> None:
        """Take the words apart. Raises LgmpError, with the remedy, where there is no sense in them."""
        place, *options = text.split(",")
        self.module, colon, self.name = place.rpartition(":")
        if not (colon and self.module and self.name.isidentifier()):
            raise LgmpError(
                f"{text or 'nothing'} is no device: give MODULE:CLASS or FILE.py:CLASS, then ,KEY=VALUE for each option"
            )
        self.title = place
        self.options: dict[str, str] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not (equals and key.isidentifier()):
                raise LgmpError(f"{place}: its options are KEY=VALUE, with no comma in a value, not {option!r}")
            if key in self.options:
                raise LgmpError(f"{place}: its option {key} is given twice")
            self.options[key] = value

    @property
    def is_file(self) -> bool:
        """Whether it is FILE.py:CLASS, and not MODULE:CLASS."""
        return self.module.endswith(".py") or "/" in self.module

    def make(self) -> Device:
        """Import the module and make the device. Raises LgmpError, or Defect for what the module itself got wrong."""
        module = self._load()
        found = getattr(module, self.name, None)
        if not isinstance(found, type):
            where = getattr(module, "__file__", None) or "it"
            raise LgmpError(f"{self.title}: {where} has no class {self.name}{_list(_devices(module))}")
        if not issubclass(found, Device):
            raise LgmpError(
                f"{self.title} is no device: derive it from RequestDevice or Device, of the module workers.device"
            )
        self._check_options(found)
        try:
            return found(**self.options)
        except LgmpError as error:
            raise LgmpError(f"{self.title}: {error}") from error
        except OSError as error:
            if error.filename is None:
                raise Defect from error
            raise LgmpError(f"{self.title}: {error.filename}: {error.strerror}") from error
        except Exception as error:
            raise Defect from error

    def _load(self) -> ModuleType:
        # Last, so that nobody's queue.py takes the place of Python's own.
        sys.path.append(os.path.dirname(os.path.abspath(self.module)) if self.is_file else os.getcwd())
        try:
            return self._load_file() if self.is_file else import_module(self.module)
        except ModuleNotFoundError as error:
            if self.is_file or error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise Defect from error  # it is there, and imports what is not
            raise LgmpError(
                f"{self.title}: no module {error.name} in this directory or where Python looks for modules; "
                f"its file will do as well, as FILE.py:{self.name}"
            ) from error
        except LgmpError:
            raise
        except Exception as error:
            raise Defect from error

    def _load_file(self) -> ModuleType:
        try:
            os.close(os.open(self.module, os.O_RDONLY))
        except OSError as error:
            raise LgmpError(f"{self.title}: cannot read {self.module}: {error.strerror}") from error
        except ValueError as error:
            raise LgmpError(f"{self.title}: {error}") from error
        name = os.path.splitext(os.path.basename(self.module))[0]
        spec = spec_from_file_location(name, self.module)
        if spec is None or spec.loader is None:
            raise LgmpError(f"{self.title}: {self.module} is no file of Python: its name has to end in .py")
        module = module_from_spec(spec)
        # A name that is taken stays so: what else imports it wants the other.
        sys.modules.setdefault(name, module)
        spec.loader.exec_module(module)
        return module

    def _check_options(self, kind: type[Device]) -> None:
        """Whether the class takes the options that are given. Raises LgmpError, which says what it takes."""
        from inspect import Parameter, signature  # noqa: PLC0415  costly to import

        try:
            parameters = signature(kind).parameters.values()
        except (TypeError, ValueError) as error:
            raise Defect from error
        named = [each for each in parameters if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
        names = [each.name for each in named]
        unknown = [key for key in self.options if key not in names]
        if unknown and not any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
            takes = f"it takes {', '.join(names)}" if names else "it takes none"
            raise LgmpError(f"{self.title} has no option {unknown[0]}: {takes}")
        missing = [each.name for each in named if each.default is Parameter.empty and each.name not in self.options]
        if missing:
            raise LgmpError(f"{self.title} needs the option {missing[0]}: --device {self.title},{missing[0]}=VALUE")


def _devices(module: ModuleType) -> list[str]:
    """The names of the devices that a module makes itself."""
    return [
        name
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, Device) and found.__module__ == module.__name__
    ]


def _list(names: list[str]) -> str:
    return f"; it has {', '.join(names)}" if names else "; it has none that is a device"


def _describe(text: str) -> int:
    """Print what the launcher has to know of a device, as msgpack, or what is wrong with it; gives the exit status."""
    # What somebody's own code prints must not get in between.
    answer = os.dup(1)
    os.dup2(2, 1)
    said: Mapping[str, object]
    try:
        said = _description(Specification(text))
    except LgmpError as error:
        said = {"error": str(error)}
    with os.fdopen(answer, "wb") as file:
        file.write(msgpack.packb(said, unicode_errors="surrogateescape"))
    return 1 if "error" in said else 0


def _description(specification: Specification) -> Mapping[str, object]:
    try:
        device = specification.make()
        said = {
            "kind": getattr(device, "kind", type(device).__name__.lower()),
            "device_type": getattr(device, "device_type", None),
            "queue_count": getattr(device, "queue_count", 1),
            "features": getattr(device, "features", 1 << VIRTIO_RING_F_INDIRECT_DESC),
            "config": getattr(device, "config", b""),
        }
        device.close()
    except LgmpError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, Defect) and error.__cause__ is not None else error
        traceback.print_exception(_without_ours(cause))
        what = f"{type(cause).__name__}: {cause}"
        raise LgmpError(f"{what}; this is a defect of {specification.title}") from error
    # What msgpack has no words for is shown to whoever wrote it.
    return {name: value if _has_words(value) else {"repr": repr(value)} for name, value in said.items()}


def _has_words(value: object) -> bool:
    return value is None or type(value) in (str, bytes) or (type(value) is int and -(1 << 63) <= value < 1 << 64)


def _without_ours(error: BaseException) -> BaseException:
    """An exception whose traceback begins with somebody's own code."""
    trace = error.__traceback__
    while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return error.with_traceback(trace)


def _is_ours(file: str) -> bool:
    return file in (__file__, import_module.__code__.co_filename) or file.startswith("<frozen importlib.")


def _make(options: Options) -> Device:
    if len(options.arguments) != 1:
        raise LgmpError("a device of your own takes MODULE:CLASS[,KEY=VALUE...] after `--`")
    specification = Specification(options.arguments[0])
    options.kind = options.own.get("kind", "")
    options.author = specification.title
    try:
        return specification.make()
    except Defect as error:
        cause = error.__cause__
        assert cause is not None
        raise cause from None


def main() -> None:
    """Serve a device, or say what it is (`--describe MODULE:CLASS[,KEY=VALUE...]`)."""
    if sys.argv[1:2] == ["--describe"] and len(sys.argv) == 3:
        sys.exit(_describe(sys.argv[2]))
    from workers.runtime import run  # noqa: PLC0415  --describe has no use for it

    run("custom", _make, {"kind=": "what ps is to call it"})


if __name__ == "__main__":
    main()
