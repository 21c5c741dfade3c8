"""Who is still there: each rank holds a connection open to rank zero, and the system closes it the moment a process dies.

    rank 1 ----\\
    rank 2 ----- rank zero        a rank is gone: its connection ends; rank zero tells the others
    rank 3 ----/                  rank zero is gone: all connections end

Before they have met, ranks of one machine find each other by name, as soon as they begin: importing torch alone takes
seconds. No collective and no file takes part, so a rank learns of it wherever it stands. A process that is stopped or busy keeps
its connections, since the kernel answers for it; a network that is cut is noticed by TCP's own keepalive.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import resource
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

from encoder.base.log import print_line
from encoder.base.world import MeetingPlace, World

# so long has a rank to end by its own error, which says more: after a mistake of another one
# (longer than that one waits for the others to say it, too), and after another one's death
GRACE_SECONDS = 3.5
LOST_SECONDS = 2.0
# a network may be away for so long: a switch that starts again, a link that comes back
SILENT_SECONDS = 60
CONNECT_SECONDS = 5.0
SPEAK_SECONDS = 1.0
# before they have met: how often a rank looks for its neighbours, and among how many
LOOK_SECONDS = 0.05
MOST_NEIGHBOURS = 64
FAILED_CODE = 1
# connections that nothing is left for wait in the system's queue: how
# long, before rank zero asks again
FULL_SECONDS = 1.0
# of a process beside its connections: files, workers' pipes, torch's own connections
OTHER_FILES = 1024
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_LINE_BYTES = 256
_BYE = b"bye"


class Peers:
    """The connections of one rank; owns a thread, which ends this process when another rank is gone."""

    def __init__(self, *, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.gone = ""  # which rank is gone, in words
        self._code = FAILED_CODE  # of this process then
        # what is said then, and the exit code
        self.last_words: Callable[[str], tuple[str, int]] = lambda gone: (
            f"rank {rank} ends: {gone}.",
            FAILED_CODE,
        )
        self._selector = selectors.DefaultSelector()
        self._rank_of: dict[socket.socket, int] = {}
        self._token = b""
        self._closing = False
        self._server: socket.socket | None = None  # rank zero's, for all
        self._door: socket.socket | None = None  # every rank's, for neighbours
        self._full_until = 0.0  # no connection is taken before: no file number is free
        self._full_said = False
        self._sought: list[int] = []
        self._met = False
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        os.register_at_fork(after_in_child=self._forget)

    def seek_neighbours(self, place: MeetingPlace, near: Sequence[int]) -> None:
        """Finds those of the ranks `near` that are on this machine, also those that begin later; each is watched."""
        # Linux's abstract names: no file is left, and the name is free when its process ends
        self._name = f"\0tessera {os.getuid()} {place.host} {place.port} "
        # both ways: one that dies right after it began has perhaps not
        # looked yet, but can be looked for
        self._sought = [rank for rank in near if rank != self.rank]
        with contextlib.suppress(OSError):
            door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            door.bind(f"{self._name}{self.rank}")
            door.listen(MOST_NEIGHBOURS)
            door.setblocking(False)
            self._door = door
            self._selector.register(door, selectors.EVENT_READ)
        for rank in [*self._sought]:
            self._visit(rank)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def all_have_met(self) -> None:
        """The lines to rank zero serve from now on: neighbours are let go in good order."""
        self._met = True
        self._wake()

    def listen(self, near: str) -> str:
        """On rank zero: begins to take connections. Returns the invitation for the others.

        near: the host of the meeting place, by which the others reach this machine.
        """
        # the token keeps strangers out: rank zero's port is open to the network
        self._token = secrets.token_hex(16).encode()
        _allow_files(self.size + OTHER_FILES)
        # IPv4 and IPv6 by one socket, where the system can; the system gives the port
        if socket.has_dualstack_ipv6():
            self._server = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        else:
            self._server = socket.create_server(("", 0), backlog=1024)

        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._wake()

        # several names of this machine: which of them a rank can reach depends on its network
        hosts = dict.fromkeys([near, _address_towards(near), socket.gethostname()])
        return " ".join(
            [self._token.decode(), str(self._server.getsockname()[1]), *filter(None, hosts)]
        )

    def connect(self, invitation: str) -> None:
        """On every other rank. Raises OSError where rank zero cannot be reached."""
        token, port, *hosts = invitation.split()
        problem: OSError = ConnectionError("no address")
        for host in hosts:
            connection = None
            try:
                connection = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
                connection.sendall(f"{token} {self.rank}\n".encode())
                # rank zero answers + to its token; another program on that port does not
                if connection.recv(1) != b"+":
                    raise ConnectionError("somebody else answers")
            except OSError as error:
                problem = error
                if connection is not None:
                    connection.close()
                continue
            self._hold(connection, 0)
            self._wake()
            return
        raise problem

    def close(self) -> None:
        """Leaves in good order: the others do not take it for a death."""
        self._closing = True
        # first a word: the end of a connection without it is a death
        for connection in [*self._rank_of]:
            with contextlib.suppress(OSError):
                connection.send(_BYE + b"\n")

        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=2.0)
        self._forget()
        if _of_this_process.get("peers") is self:
            del _of_this_process["peers"]

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._mouth.send(b"\0")

    def _hold(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        # the kernel of the same machine closes a dead process's socket;
        # only a network needs to be asked
        if connection.family != socket.AF_UNIX:
            _keep_alive(connection)
        self._rank_of[connection] = rank
        self._selector.register(connection, selectors.EVENT_READ)

    def _forget(self) -> None:
        """Also in a forked child: its copies would keep the connections of a dead rank open."""
        for one in (*self._rank_of, self._server, self._door, self._ear, self._mouth):
            if one is not None:
                one.close()
        self._selector.close()
        self._rank_of = {}

    def _watch(self) -> None:
        # connections that have not said who they are, and since when
        strangers: dict[socket.socket, float] = {}
        while not self._closing:
            self._ask_again()
            # often while neighbours are looked for, or a connection waits for
            # room; else an event wakes it
            if self._sought:
                soon = LOOK_SECONDS
            elif self._full_until:
                soon = FULL_SECONDS
            else:
                soon = 5.0
            for key, _ in self._selector.select(timeout=soon):
                one = key.fileobj
                if self._closing:
                    return
                # woken by this process: what changed is looked at below
                if one is self._ear:
                    one.recv(64)
                elif one in (self._server, self._door):
                    self._accept(one, strangers)
                elif one in strangers:
                    self._greet(one, strangers)
                elif one in self._rank_of:
                    self._read(one)
                if self.gone:
                    self._end()
                    return

            if self._met:
                self._let_neighbours_go()
            for rank in [*self._sought]:
                self._visit(rank)
            # a stranger that says nothing does not stay
            for one, since in [*strangers.items()]:
                if time.monotonic() - since > 2 * CONNECT_SECONDS:
                    self._drop(one)
                    del strangers[one]

    def _visit(self, rank: int) -> None:
        """Connects to a neighbour, if it has begun."""
        door = None
        try:
            door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            door.connect(f"{self._name}{rank}")
            door.send(f"{self.rank}\n".encode())
        except OSError:
            if door is not None:
                door.close()
            return
        self._sought.remove(rank)
        self._hold(door, rank)

    def _let_neighbours_go(self) -> None:
        # the door stays open: one that has just connected, and waits to be taken, would see
        # its end as this rank's death
        self._met = False
        self._sought = []
        for connection in [one for one in self._rank_of if one.family == socket.AF_UNIX]:
            with contextlib.suppress(OSError):
                connection.send(_BYE + b"\n")
            self._drop(connection)

    def _accept(self, server: socket.socket, strangers: dict[socket.socket, float]) -> None:
        try:
            connection, _ = server.accept()
        except OSError as error:
            if error.errno in _FULL:
                self._wait_for_room(server, error)
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)
        strangers[connection] = time.monotonic()

    def _wait_for_room(self, server: socket.socket, error: OSError) -> None:
        """A connection that cannot be taken stays readable: asked without a pause, it would keep a core busy."""
        if not self._full_said:
            self._full_said = True
            print_line(
                f"warning: rank {self.rank} cannot take another rank's connection"
                f" ({error.strerror}): that this one is gone is noticed by the next collective"
                f" alone. Needed: `ulimit -n` of the number of ranks and {OTHER_FILES:,} more.",
                sys.stderr,
                survive=True,
            )
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(server)
        self._full_until = time.monotonic() + FULL_SECONDS

    def _ask_again(self) -> None:
        if self._full_until and time.monotonic() >= self._full_until:
            self._full_until = 0.0
            for one in (self._server, self._door):
                if one is not None and one not in self._selector.get_map():
                    self._selector.register(one, selectors.EVENT_READ)

    def _greet(self, connection: socket.socket, strangers: dict[socket.socket, float]) -> None:
        """The first line of a connection: who knows the token is a rank, all others are sent away."""
        del strangers[connection]
        self._selector.unregister(connection)
        with contextlib.suppress(OSError, ValueError):
            *token, rank = connection.recv(_LINE_BYTES).split()
            # a neighbour shows by its user that it is ours, a rank of the network by the token
            if connection.family == socket.AF_UNIX:
                known = not token and _user_of(connection) == os.getuid()
            else:
                known = len(token) == 1 and hmac.compare_digest(token[0], self._token)
            if known and 0 <= int(rank) < self.size:
                if connection.family != socket.AF_UNIX:
                    connection.send(b"+")
                self._hold(connection, int(rank))
                return
        connection.close()

    def _read(self, connection: socket.socket) -> None:
        rank = self._rank_of[connection]
        try:
            text = connection.recv(_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            text = b""
            # TCP's keepalive gave up
            if isinstance(error, TimeoutError):
                self.gone = f"rank {rank} does not answer, its machine or the network is gone"

        if text.startswith(_BYE):
            self._drop(connection)
            return

        # a line "CODE WORDS" reports a mistake, or another's death;
        # an end without one is a death
        if text:
            code, _, words = text.decode("ascii", "replace").split("\n", 1)[0].partition(" ")
            self.gone = words
            self._code = _exit_code(code)
        else:
            self.gone = self.gone or f"rank {rank} is gone"

        self._drop(connection)
        # rank zero passes it on; elsewhere it reaches who is still connected
        self._tell(f"{self._code} {self.gone}")

    def fail(self, code: int) -> None:
        """This rank has said its mistake and ends with this exit code: so do the others, if not by their own."""
        # one that heard of it first, and lets this rank go, is no death: a mistake of both has one code on both
        self._code = code
        self._tell(f"{code} rank {self.rank} met a mistake")

    def _tell(self, line: str) -> None:
        for connection in [*self._rank_of]:
            with contextlib.suppress(OSError):
                connection.send(f"{line}\n".encode())

    def _drop(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        self._rank_of.pop(connection, None)
        connection.close()

    def _end(self) -> None:
        """Ends this process, unless its main thread does so first or leaves in good order."""
        # a rank that meets a mistake in the same collective says it better: it gets time to do so
        patience = GRACE_SECONDS
        if self._code == FAILED_CODE:
            patience = LOST_SECONDS
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if self._closing:
                return
            time.sleep(0.05)
        # on a thread: a file system or a pipe that stands still keeps nobody here
        code = [self._code]
        speaker = threading.Thread(target=self._speak, args=(code,), daemon=True)
        speaker.start()
        speaker.join(SPEAK_SECONDS)
        os._exit(code[0])

    def _speak(self, code: list[int]) -> None:
        line, found = self.last_words(self.gone)
        code[0] = found
        if self._code != FAILED_CODE:
            code[0] = self._code
        print_line(line, sys.stderr, survive=True)


_of_this_process: dict[str, Peers] = {}


def peers_of_this_rank() -> Peers | None:
    """The lines to the other ranks; None on one rank, and after leaving."""
    return _of_this_process.get("peers")


def _exit_code(text: str) -> int:
    """The exit code that a peer's line names, that of a failure where it names none."""
    if text.isdecimal() and int(text) < 256:
        return int(text)
    return FAILED_CODE


def watch_peers(world: World, place: MeetingPlace) -> Peers:
    """Begins to watch the neighbours, unless this process does; call it early, and again to meet."""
    peers = _of_this_process.get("peers")
    if peers is None:
        peers = _of_this_process["peers"] = Peers(rank=world.rank, size=world.size)
        # ranks of this node by their numbers; without local sizes,
        # any rank may be on this machine
        first = world.rank - world.local_rank
        if world.local_size > 1:
            near = range(first, first + world.local_size)
        else:
            near = range(min(world.size, MOST_NEIGHBOURS))
        peers.seek_neighbours(place, near)
        peers.start()
    return peers


def _user_of(connection: socket.socket) -> int:
    """The user of the process at the other end of a Unix socket."""
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return user


def _allow_files(needed: int) -> None:
    """Raises this process's own limit of open files, which is often 1,024, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _keep_alive(connection: socket.socket) -> None:
    """The kernels of both ends ask each other whether they live, whatever their processes do."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", SILENT_SECONDS // 6),
        ("TCP_KEEPINTVL", SILENT_SECONDS // 6),
        ("TCP_KEEPCNT", 5),
        ("TCP_USER_TIMEOUT", 1000 * SILENT_SECONDS),
    ):
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _address_towards(host: str) -> str:
    """The address of this machine on the way to a host; "" where there is none. Sends nothing."""
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(address)
            return s.getsockname()[0]
    return ""
