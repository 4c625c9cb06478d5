"""The host's side of network devices, as the launcher makes it for the worker that inherits it.

`Tap` is a tap of the kernel, with an address or in a bridge; it takes CAP_NET_ADMIN. `UserNetwork` is a user-mode
stack that needs no rights at all: passt, which Debian has, speaks Ethernet over a socket that we give it, confines
itself, and makes of the guest's connections sockets of its own.

Neither leaves anything behind: a tap goes with the last process that has it open, passt with the other end of its
socket.

Who serves another monitor's guest has a tap that is there already, made by somebody with the right to do so:
`open_existing_tap` takes it by its name, `tap_of_descriptor` as an open file. It stays as it is when we go.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import ipaddress
import os
import re
import socket
import struct
import subprocess
from typing import NamedTuple

from lgmp import shared_file, tap
from lgmp.closing import Closing
from lgmp.errors import LgmpError
from lgmp.virtio.net import ETHERNET_MTU, HEADER_BYTES, HOST_OFFLOADS, MAC_BYTES

# net/if.h; with the NUL that ends it.
IFNAMSIZ = 16
_SYNTAX = "it takes ADDRESS[/PREFIX][:MAC] or bridge:NAME[:MAC], for example 192.168.19.1"
_BRIDGE_PREFIX = "bridge:"
_MAC = re.compile("[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{1,2}){5}")
_PREFIXES = {str(length) for length in range(1, 33)}
# linux/sockios.h
_SIOCGIFMTU = 0x8921
# Where there is no right to make a tap.
_NO_RIGHT = "be root, or use --net user, which needs no rights"

# The network of --net user, the same for every guest: each has one of its own.
USER_GUEST = ipaddress.IPv4Interface("10.0.2.15/24")
USER_HOST = ipaddress.IPv4Address("10.0.2.2")
USER_HOST_MAC = bytes.fromhex("52550a000202")
PASST = "passt"
# passt answers within milliseconds of its start; in seconds.
_PASST_HANGS_AFTER = 20.0
_PASST_PATIENCE = 2.0
# What passt says where there is no system logger, of everything else that it says.
_PASST_NOISE = ("Failed to send ", "Don't run as root")
_ROUTES = "/proc/self/net/route"

_ETH_P_ARP = 0x0806
_ARP_REQUEST = 1
_ARP_REPLY = 2


class TapOption(NamedTuple):
    """One `--tunnet`: the address that the tap gets, or the bridge that it joins; the guest's MAC if it is chosen."""

    address: ipaddress.IPv4Interface | None = None
    bridge: str | None = None
    mac: bytes | None = None

    @classmethod
    def parse(cls, text: str) -> TapOption:
        """Take what stands after `--tunnet`. Raises LgmpError for what cannot be meant.

        Without /PREFIX an address has that of its class, as the kernel gives it and every lguest launcher had it.
        """
        if text.startswith(_BRIDGE_PREFIX):
            name, colon, mac = text.removeprefix(_BRIDGE_PREFIX).partition(":")
            if not name:
                raise LgmpError(f"--tunnet {text}: must specify bridge name; {_SYNTAX}")
            if not _can_be_interface(name):
                raise LgmpError(f"--tunnet {text}: {name!r} cannot be the name of a bridge; {_SYNTAX}")
            return cls(bridge=name, mac=parse_mac(f"--tunnet {text}", mac) if colon else None)
        address, colon, mac = text.partition(":")
        return cls(address=_parse_address(text, address), mac=parse_mac(f"--tunnet {text}", mac) if colon else None)


class UserOption(NamedTuple):
    """One `--net user`."""


NetworkOption = TapOption | UserOption


class Network(Closing):
    """The host's side of one device: what the bus, the worker and the user are told of it.

    `mac` is the guest's; `offloads` the mask of virtio features that it has beyond plain frames; `mtu` the longest
    packet that it takes, in bytes, where that is known to be another than Ethernet's; `title` says what it is;
    `worker_options` and `descriptor` are for the worker.
    """

    mtu = ETHERNET_MTU

    def __init__(
        self, *, title: str, mac: bytes, offloads: int, worker_options: tuple[str, ...], descriptor: int
    ) -> None:
        """`open_network` is what callers want."""
        self.title = title
        self.mac = mac
        self.offloads = offloads
        self.worker_options = worker_options
        self.descriptor = descriptor

    def close(self) -> None:
        """Give it up. Until then it outlives the worker that has it too, and a successor of that can have it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def open_network(option: NetworkOption, number: int) -> Network:
    """Make the host's side of the guest's device `number`, counted from 0. Raises LgmpError, with the remedy."""
    if isinstance(option, UserOption):
        return UserNetwork.start(derive_mac(number))
    return Tap.open(option, option.mac or derive_mac(number))


def derive_mac(number: int) -> bytes:
    """A MAC address for device `number` of this launcher, locally administered; the same when the guest has rebooted.

    The original gave the guest the address of the tap itself. What comes for that to a bridge the bridge takes for its
    own, and the guest never sees it; so the guest has one of its own. It is made of what tells launchers apart: the
    boot of the machine, the process id, and the namespace of that.
    """
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        boot = file.read()
    what = b"%s %d %d %d" % (boot.strip(), os.stat("/proc/self/ns/pid").st_ino, os.getpid(), number)
    digest = bytearray(hashlib.sha256(what).digest()[:MAC_BYTES])
    digest[0] = 0x02
    return bytes(digest)


def format_mac(mac: bytes) -> str:
    """As people write it."""
    return mac.hex(":")


def parse_mac(where: str, mac: str) -> bytes:
    """The MAC address of one guest, as people write it. Raises LgmpError, which begins with `where` it stood."""
    if not _MAC.fullmatch(mac):
        raise LgmpError(
            f"{where}: Failed to parse mac address '{mac}': it is six bytes in hexadecimal, "
            "for example 02:00:00:00:00:01"
        )
    parsed = bytes(int(field, 16) for field in mac.split(":"))
    if parsed[0] & 1 or not any(parsed):
        kind = "of a group" if any(parsed) else "of nobody"
        raise LgmpError(f"{where}: {mac} is the address {kind}, not of one guest: try 02:00:00:00:00:01")
    return parsed


def _parse_address(text: str, address: str) -> ipaddress.IPv4Interface:
    plain, slash, prefix = address.partition("/")
    if slash and prefix not in _PREFIXES:
        raise LgmpError(f"--tunnet {text}: {prefix!r} is not the length of a prefix, 1 to 32; {_SYNTAX}")
    try:
        ip = ipaddress.IPv4Address(plain)
    except ValueError as error:
        raise LgmpError(f"--tunnet {text}: Failed to parse IP address '{plain}': {error}; {_SYNTAX}") from error
    if not slash:
        first = int(ip) >> 24
        prefix = "8" if first < 128 else "16" if first < 192 else "24"
    interface = ipaddress.IPv4Interface(f"{plain}/{prefix}")
    network = interface.network
    if ip.is_unspecified or ip.is_multicast or ip.is_reserved or ip.is_loopback:
        raise LgmpError(f"--tunnet {text}: {ip} cannot be the address of this machine's end; try 192.168.19.1")
    if network.prefixlen < 31 and ip in (network.network_address, network.broadcast_address):
        raise LgmpError(f"--tunnet {text}: {ip} is not an address within {network}; try {network.network_address + 1}")
    return interface


def _can_be_interface(name: str) -> bool:
    """As dev_valid_name() of the kernel has it."""
    return (
        0 < len(os.fsencode(name)) < IFNAMSIZ
        and name not in (".", "..")
        and not any(character in "/:" or character.isspace() for character in name)
    )


class Tap(Network):
    """A tap, up, with its address or in its bridge. `name` is its name, tap0 for example."""

    name = ""

    @classmethod
    def open(cls, option: TapOption, mac: bytes) -> Tap:
        """Make it. Raises LgmpError, with the remedy, and then nothing is left of it."""
        with contextlib.ExitStack() as undo:
            descriptor = _open_tun("or use --net user", _NO_RIGHT)
            undo.callback(os.close, descriptor)
            name, has_header = _make_tap(descriptor)
            offloads = _probe_offloads(descriptor) if has_header else 0
            _set_up(name, option, _host_mac(mac))
            undo.pop_all()
        where = f"{option.address}" if option.address is not None else f"bridge {option.bridge}"
        made = cls(
            title=f"{name} ({where})",
            mac=mac,
            offloads=offloads,
            worker_options=_tap_options(descriptor, has_header),
            descriptor=descriptor,
        )
        made.name = name
        return made


def open_existing_tap(name: str, mac: bytes | None = None) -> Network:
    """A tap that is there, by its name; `mac` is the guest's, else one is made up.

    Raises LgmpError, with the remedy, where there is none, or it is not ours to have.
    """
    if not _can_be_interface(name):
        raise LgmpError(f"{name!r} cannot be the name of a tap; ip tuntap list shows those that there are")
    try:
        socket.if_nametoindex(name)
    except OSError as error:
        # The kernel would make one that goes with us, down and without an address.
        raise LgmpError(f"there is no tap {name}: {_how_to_make(name)} makes it, as root") from error
    descriptor = _open_tun("or use another network", f"be root, or have root do: chmod 666 {tap.TUN_DEVICE}")
    try:
        has_header = _attach_tap(descriptor, name)
        offloads = _probe_offloads(descriptor) if has_header else 0
        mtu = _mtu_of(name)
    except BaseException:
        os.close(descriptor)
        raise
    made = Network(
        title=name,
        mac=mac or derive_mac(0),
        offloads=offloads,
        worker_options=_tap_options(descriptor, has_header),
        descriptor=descriptor,
    )
    made.mtu = mtu
    return made


def tap_of_descriptor(descriptor: int, mac: bytes | None = None) -> Network:
    """A tap that somebody has opened for us; `mac` is the guest's, else one is made up.

    The descriptor is the Network's from now on: it does not block, and is not passed on to programs by itself. Raises
    LgmpError, with the remedy, where it is no tap; then it is the caller's still. That it was opened with IFF_NO_PI is
    taken for granted: the flag that the kernel gives in its place says something else (IFF_NOFILTER).
    """
    # struct ifreq: the name, the flags.
    request = bytearray(40)
    try:
        fcntl.ioctl(descriptor, tap.TUNGETIFF, request)
    except OSError as error:
        what = {
            errno.EBADF: "is not open: it has to be inherited",
            errno.EBADFD: f"is {tap.TUN_DEVICE}, but no tap yet: its opener has to call TUNSETIFF",
        }.get(error.errno or 0, f"is not a tap: it has to be {tap.TUN_DEVICE}, open for reading and writing")
        raise LgmpError(f"descriptor {descriptor} {what}") from error
    name, flags = struct.unpack_from("16sH", request)
    name = name.rstrip(b"\0").decode(errors="replace")
    if not flags & tap.IFF_TAP:
        raise LgmpError(f"descriptor {descriptor} is {name}, a tun, which has no Ethernet: open it with IFF_TAP")
    has_header = bool(flags & tap.IFF_VNET_HDR)
    os.set_blocking(descriptor, False)
    os.set_inheritable(descriptor, False)
    return Network(
        title=name,
        mac=mac or derive_mac(0),
        offloads=_probe_offloads(descriptor) if has_header else 0,
        worker_options=_tap_options(descriptor, has_header),
        descriptor=descriptor,
    )


def _tap_options(descriptor: int, has_header: bool) -> tuple[str, ...]:
    return ("--tap-fd", str(descriptor), *(("--vnet-header",) if has_header else ()))


def _how_to_make(name: str) -> str:
    return f"ip tuntap add dev {name} mode tap user $USER && ip link set {name} up"


def _open_tun(otherwise: str, no_right: str) -> int:
    """The descriptor of what may become a tap. What else there is, and the remedy for no right, end what is raised."""
    try:
        return os.open(tap.TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise LgmpError(
            f"Failed to open {tap.TUN_DEVICE}: {error.strerror}; modprobe tun as root makes it, "
            f"in a container it has to be let in; {otherwise}"
        ) from error
    except PermissionError as error:
        raise LgmpError(f"Failed to open {tap.TUN_DEVICE}: {error.strerror}; {no_right}") from error
    except OSError as error:
        remedy = "modprobe tun as root" if error.errno in (errno.ENODEV, errno.ENXIO) else otherwise
        raise LgmpError(f"Failed to open {tap.TUN_DEVICE}: {error.strerror}; {remedy}") from error


def _make_tap(descriptor: int) -> tuple[str, bool]:
    """Have `descriptor` be a new tap; gives its name, and whether it has the virtio header before each frame."""
    flags = _tap_flags(descriptor)
    has_header = bool(flags & tap.IFF_VNET_HDR)
    try:
        name = _set_interface(descriptor, "tap%d", flags)  # a template for the kernel
        if has_header:
            fcntl.ioctl(descriptor, tap.TUNSETVNETHDRSZ, HEADER_BYTES.to_bytes(4, "little"))
    except PermissionError as error:
        raise LgmpError(
            f"configuring {tap.TUN_DEVICE}: {error.strerror}; a tap takes CAP_NET_ADMIN: {_NO_RIGHT}"
        ) from error
    except OSError as error:
        raise LgmpError(f"configuring {tap.TUN_DEVICE}: {error.strerror}") from error
    return name, has_header


def _attach_tap(descriptor: int, name: str) -> bool:
    """Have `descriptor` be the tap `name`; gives whether it has the virtio header before each frame."""
    flags = _tap_flags(descriptor)
    try:
        try:
            _set_interface(descriptor, name, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Perhaps one of several queues, of which we are the one that is used.
            _set_interface(descriptor, name, flags | tap.IFF_MULTI_QUEUE)
    except OSError as error:
        match error.errno:
            case errno.EBUSY:
                what = "another process has it open: fuser -v /dev/net/tun shows which"
            case errno.EPERM | errno.EACCES:
                what = f"it is another user's: be that user or root, or make one of your own: {_how_to_make('NAME')}"
            case errno.EINVAL:
                what = f"it is not a tap; ip tuntap list shows those that there are, {_how_to_make('NAME')} makes one"
            case _:
                what = f"{error.strerror or error}; {_how_to_make('NAME')} makes another"
        raise LgmpError(f"cannot have the tap {name}: {what}") from error
    return bool(flags & tap.IFF_VNET_HDR)


def _tap_flags(descriptor: int) -> int:
    """The flags of a tap for a worker, with the virtio header where the kernel knows it."""
    word = bytearray(4)
    with contextlib.suppress(OSError):  # older than 2.6.27: no such question, no such header
        fcntl.ioctl(descriptor, tap.TUNGETFEATURES, word)
    return tap.IFF_TAP | tap.IFF_NO_PI | int.from_bytes(word, "little") & tap.IFF_VNET_HDR


def _set_interface(descriptor: int, name: str, flags: int) -> str:
    """TUNSETIFF; gives the name that the interface has. Raises OSError."""
    # struct ifreq: the name, then the flags.
    request = bytearray(struct.pack("16sH22x", os.fsencode(name), flags))
    fcntl.ioctl(descriptor, tap.TUNSETIFF, request)
    return os.fsdecode(bytes(request[:IFNAMSIZ]).rstrip(b"\0"))


def _mtu_of(name: str) -> int:
    """In bytes."""
    request = bytearray(struct.pack("16s24x", os.fsencode(name)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
        fcntl.ioctl(asked, _SIOCGIFMTU, request)
    return int.from_bytes(request[IFNAMSIZ : IFNAMSIZ + 4], "little")


def _probe_offloads(descriptor: int) -> int:
    """The virtio features that the tap takes; it hands out plain frames until the driver has accepted some."""
    for offloads in tap.OFFLOADS:
        try:
            fcntl.ioctl(descriptor, tap.TUNSETOFFLOAD, offloads)
        except OSError:
            continue
        fcntl.ioctl(descriptor, tap.TUNSETOFFLOAD, 0)
        return HOST_OFFLOADS | tap.features_of(offloads)
    return HOST_OFFLOADS


def _host_mac(mac: bytes) -> bytes:
    """The address of the tap itself: the guest's, but for its first byte.

    A bridge takes the lowest of its ports' addresses; this high one leaves it alone when a guest comes or goes.
    """
    return bytes([0xFE if mac[0] != 0xFE else 0xFA]) + mac[1:]


def _set_up(name: str, option: TapOption, mac: bytes) -> None:
    # Slow to load, and only who has a tap needs it.
    from pyroute2 import IPRoute  # noqa: PLC0415
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    what = "bring the tap up"
    try:
        with IPRoute() as route:
            index = socket.if_nametoindex(name)
            route.link("set", index=index, address=format_mac(mac))
            if option.bridge is not None:
                what = f"add {name} to bridge {option.bridge}"
                route.link("set", index=index, master=_find_bridge(route, name, option.bridge))
            if option.address is not None:
                what = f"give a tap the address {option.address}"
                network = option.address.network
                broadcast = {} if network.prefixlen >= 31 else {"broadcast": str(network.broadcast_address)}
                route.addr("add", index=index, address=str(option.address.ip), prefixlen=network.prefixlen, **broadcast)
            what = "bring the tap up"
            route.link("set", index=index, state="up")
    except NetlinkError as error:
        if error.code in (errno.EPERM, errno.EACCES):
            raise LgmpError(f"no permission to {what} (that takes CAP_NET_ADMIN): {_NO_RIGHT}") from error
        raise LgmpError(f"cannot {what}: {os.strerror(error.code)}") from error
    except OSError as error:
        raise LgmpError(f"cannot {what}: {error.strerror or error}") from error


def _find_bridge(route: object, port: str, name: str) -> int:
    """The index of the bridge that `port` is to join. Raises LgmpError where there is none."""
    try:
        index = socket.if_nametoindex(name)
    except OSError as error:
        raise LgmpError(
            f"can't add {port} to bridge {name}: there is none; "
            f"ip link add {name} type bridge && ip link set {name} up, as root, makes it"
        ) from error
    (link,) = route.get_links(index)  # type: ignore[attr-defined]
    info = link.get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "bridge":
        raise LgmpError(
            f"can't add {port} to bridge {name}: it is not a bridge; "
            "ip link show type bridge lists those that there are"
        )
    return index


class UserNetwork(Network):
    """A user-mode network stack, in a process of its own, which ends when the other end of its socket is closed."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, mac: bytes) -> UserNetwork:
        """Start passt and wait until it answers. Raises LgmpError, with the remedy, where it does not."""
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            said = shared_file.create("passt-stderr")
            undo.callback(os.close, said)
            try:
                process = subprocess.Popen(
                    _passt_command(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    pass_fds=(theirs.fileno(),),
                    # A ^C at the terminal is not for it: it goes when the guest's device does.
                    process_group=0,
                )
            except FileNotFoundError as error:
                raise LgmpError(
                    "--net user needs passt, which is not installed: apt-get install passt, or use --tunnet as root"
                ) from error
            except OSError as error:
                raise LgmpError(f"cannot start passt: {error.strerror or error}") from error
            theirs.close()
            with contextlib.ExitStack() as on_error:
                on_error.callback(process.wait)
                on_error.callback(process.kill)
                if not _answers(ours, mac):
                    process.kill()
                    process.wait()
                    raise LgmpError(f"passt, the network of --net user, cannot start{_last_words(said)}")
                on_error.pop_all()
            descriptor = ours.detach()
        made = cls(
            title=f"user-mode network ({USER_GUEST.ip})",
            mac=mac,
            offloads=0,
            worker_options=("--stream-fd", str(descriptor)),
            descriptor=descriptor,
        )
        made.process = process
        return made

    def close(self) -> None:
        """Have it end, and wait until it has."""
        super().close()
        try:
            self.process.wait(_PASST_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _passt_command(descriptor: int) -> list[str]:
    """passt on an open socket, IPv4 alone, with addresses that do not depend on where it runs."""
    command = [
        *(PASST, "--foreground", "--quiet", "--one-off", "--ipv4-only"),
        *("--fd", str(descriptor)),
        *("--address", str(USER_GUEST.ip), "--netmask", str(USER_GUEST.network.prefixlen)),
        *("--gateway", str(USER_HOST), "--mac-addr", format_mac(USER_HOST_MAC)),
    ]
    if not _has_default_route():
        # It would refuse to start; so the guest reaches this machine, and that is all there is to reach.
        command += ["--interface", "lo"]
    return command


def _has_default_route() -> bool:
    try:
        with open(_ROUTES) as file:
            # Interface, destination and more, in hexadecimal, after a line of headings.
            return any(line.split()[1] == "00000000" for line in list(file)[1:])
    except OSError:
        return True


def _answers(sock: socket.socket, mac: bytes) -> bool:
    """Whether the stack is there: it is asked, as the guest would do it, for the address of its own end (ARP)."""
    request = arp_request(mac)
    sock.settimeout(_PASST_HANGS_AFTER)
    try:
        sock.sendall(len(request).to_bytes(4, "big") + request)
        while True:
            # Not a byte more than the frame: what follows is the worker's.
            frame = _receive_exactly(sock, int.from_bytes(_receive_exactly(sock, 4), "big"))
            if frame[12:14] == _ETH_P_ARP.to_bytes(2, "big") and frame[20:22] == _ARP_REPLY.to_bytes(2, "big"):
                return True
    except (OSError, EOFError):
        return False


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = sock.recv(count - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received


def arp_request(mac: bytes) -> bytes:
    """A frame from the guest of --net user that asks who its host is (RFC 826)."""
    ethernet = b"\xff" * MAC_BYTES + mac + _ETH_P_ARP.to_bytes(2, "big")
    arp = struct.pack("!HHBBH", 1, 0x0800, MAC_BYTES, 4, _ARP_REQUEST)
    return ethernet + arp + mac + USER_GUEST.ip.packed + bytes(MAC_BYTES) + USER_HOST.packed


def _last_words(said: int) -> str:
    """What it wrote to stderr, in a line, without what says nothing."""
    text = os.pread(said, 4096, 0).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(_PASST_NOISE)]
    return f": {'; '.join(lines[-3:])}" if lines else ": it does not answer"
