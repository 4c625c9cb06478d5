"""lgmp: a virtual machine launcher with a process per device."""

__version__ = "0.1.0"
