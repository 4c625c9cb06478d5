"""A stand-in for /dev/lguest, the device of the kernel's lg module, which no kernel has had since 4.14.

A process of its own, to be started by tests (`lguest_devices.py`), mounts a file system of one file that answers reads
and writes as the module does, and just as strictly; the guest runs on the embedded host, in memory of the launcher's.

`module.py` has the module's rules, `caller.py` reaches into the calling process for memory and eventfds, `fuse.py`
speaks with the kernel, and `__main__.py` puts them together: it logs every system call, and injects faults.
"""
