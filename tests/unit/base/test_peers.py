"""The lines between ranks, without ranks: sockets alone, as many as a system lets a process have."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator

import pytest

import encoder.base.peers as peers_module
from encoder.base.dist import _meet
from encoder.base.peers import Peers, watch_peers
from encoder.base.world import MeetingPlace, World


def ranks_held(zero: Peers, *, wanted: int) -> list[int]:
    """The ranks whose lines it holds, once there are so many."""
    until = time.monotonic() + 10
    while len(zero._rank_of) < wanted and time.monotonic() < until:
        time.sleep(0.02)
    return sorted(zero._rank_of.values())


@contextlib.contextmanager
def listening(size: int) -> Iterator[tuple[Peers, str]]:
    zero = Peers(rank=0, size=size)
    zero.start()
    try:
        yield zero, zero.listen("127.0.0.1")
    finally:
        zero.close()


def test_rank_zero_without_free_file_numbers_says_so_and_does_not_spin(capsys):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listening(8) as (zero, invitation):
        _, port, *_ = invitation.split()
        others = [socket.socket() for _ in range(4)]
        opened = []
        try:
            highest = max(one.fileno() for one in others)
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
            with contextlib.suppress(OSError):
                while True:
                    opened.append(socket.socket())
            for one in others:
                one.connect(("127.0.0.1", int(port)))
            began = time.process_time()
            time.sleep(2.5)
            cpu_seconds = time.process_time() - began
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for one in opened:
                one.close()
        said = capsys.readouterr().err
        assert said.count("cannot take another rank's connection (Too many open files)") == 1
        assert cpu_seconds < 0.5

        # with room again, the connections that waited are taken
        for rank, one in enumerate(others, start=1):
            one.settimeout(5.0)
            one.sendall(f"{invitation.split()[0]} {rank}\n".encode())
            assert one.recv(1) == b"+"
        assert ranks_held(zero, wanted=4) == [1, 2, 3, 4]
        for one in others:
            one.sendall(b"bye\n")
            one.close()


def test_a_thousand_ranks_hold_their_lines_to_rank_zero():
    with listening(1000) as (zero, invitation):
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(
            2024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        )
        token, port, *_ = invitation.split()
        lines = []
        for rank in range(1, 1000):
            lines.append(socket.create_connection(("127.0.0.1", int(port)), timeout=20.0))
            lines[-1].sendall(f"{token} {rank}\n".encode())
        assert all(line.recv(1) == b"+" for line in lines)
        assert ranks_held(zero, wanted=999) == [*range(1, 1000)]
        for line in lines:
            line.sendall(b"bye\n")
            line.close()


class _Store(dict):
    """As much of a store as ranks need to meet: the others have come."""

    def check(self, keys):
        return True

    def get(self, key):
        return self[key]

    def add(self, key, number):
        return 2


def test_a_rank_that_cannot_reach_rank_zero_says_so_once_and_goes_on(monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    store = _Store(peers=f"token {port} 127.0.0.1".encode())
    monkeypatch.setattr("encoder.base.dist._store", lambda *args, **values: store)
    monkeypatch.setattr("encoder.base.dist.dist.PrefixStore", lambda prefix, inner: inner)
    monkeypatch.setattr(peers_module, "CONNECT_SECONDS", 0.5)
    world = World(rank=1, size=2, local_rank=0, local_size=1)
    place = MeetingPlace(host="127.0.0.1", port=port, said_by="the test")
    try:
        assert _meet(world, place, timeout_seconds=5.0) is store
        said = capsys.readouterr().err
        assert (
            said.count("warning: rank 1 has no line to rank 0 (Connection refused)") == 1
            and len(said.splitlines()) == 1
        )
        assert not watch_peers(world, place).gone
    finally:
        watch_peers(world, place).close()


@pytest.mark.parametrize("dies", [True, False])
def test_a_neighbour_that_has_begun_is_missed_and_one_never_seen_is_not(dies, tmp_path):
    """The limit: of a rank that dies before it began to watch, its neighbours know nothing; its launcher ends them."""
    place = MeetingPlace(host=f"nowhere{dies}", port=1, said_by="the test")
    zero = Peers(rank=0, size=2)
    zero._end = lambda: None
    zero.seek_neighbours(place, range(2))
    zero.start()
    try:
        if dies:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
                one.connect(f"{zero._name}0")
                one.sendall(b"1\n")
                time.sleep(0.5)
        until = time.monotonic() + (5.0 if dies else 1.0)
        while not zero.gone and time.monotonic() < until:
            time.sleep(0.02)
        assert zero.gone == ("rank 1 is gone" if dies else "")
    finally:
        zero.close()


def test_neighbours_whose_connections_still_wait_are_let_go_without_a_death():
    """All have met while rank 1, slow, has not yet taken the connections of its neighbours."""
    place = MeetingPlace(host="nowhere waiting", port=1, said_by="the test")
    ranks = [Peers(rank=rank, size=4) for rank in range(4)]
    slow = ranks[1]
    for one in ranks:
        one._end = lambda: None
    slow.seek_neighbours(place, range(4))
    try:
        for one in (ranks[0], ranks[2], ranks[3]):
            one.seek_neighbours(place, range(4))
            one.start()
        slow.all_have_met()
        slow.start()
        time.sleep(0.5)
        assert [one.gone for one in ranks] == [""] * 4
        for one in ranks:
            one.all_have_met()
        until = time.monotonic() + 5.0
        while any(one._rank_of for one in ranks) and time.monotonic() < until:
            time.sleep(0.02)
        assert not any(one._rank_of for one in ranks)
        assert [one.gone for one in ranks] == [""] * 4
    finally:
        for one in ranks:
            one.close()


def test_a_mistake_of_both_has_its_code_on_both():
    """Who is told of it first lets the other go; that end of a connection is no death then."""
    peers = Peers(rank=1, size=2)
    mine, other = socket.socketpair()
    peers._hold(mine, 0)
    peers.fail(2)
    assert other.recv(64) == b"2 rank 1 met a mistake\n"
    other.close()
    peers._read(mine)
    assert peers.gone and peers._code == 2
    peers._forget()
